"""A vocabulary projection that has not been carried out yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """What a causal language model's logits are made of, without the logits.

    Equals::

        logits = hidden @ weight.T + bias
        logits = scale * logits
        logits = softcap * torch.tanh(logits / softcap)      # only where softcap is given

    Args:
        hidden: last hidden states (batch, sequence, width), after the final norm.
        weight: vocabulary matrix (vocabulary, width).
        bias: (vocabulary,) or None.
        scale: factor on the logits (Cohere publishes it; Granite publishes its reciprocal).
        softcap: bound of the logits (Gemma-2: 30) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden states of shape {tuple(self.hidden.shape)} do not fit a vocabulary matrix of shape "
                f"{tuple(self.weight.shape)}; expected (..., width) and (vocabulary, width)"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias of shape {tuple(self.bias.shape)} does not fit {self.weight.shape[0]} vocabulary rows; "
                "expected (vocabulary,)"
            )

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0]

    def logits(self) -> Tensor:
        """The dense logits (batch, sequence, vocabulary), in the precision of the product."""
        weight = self.weight.to(self.hidden.dtype)
        bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
        logits = F.linear(self.hidden, weight, bias)
        if self.scale != 1.0:
            logits = scaled(logits, self.scale)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def to(self, dtype: torch.dtype) -> Head:
        """The same head, its tensors in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias, self.scale, self.softcap)

    def narrow(self, usable: int) -> Head:
        """The same head over the first `usable` vocabulary rows."""
        if usable == self.vocabulary_size:
            return self
        bias = None if self.bias is None else self.bias[:usable]
        return Head(self.hidden, self.weight[:usable], bias, self.scale, self.softcap)


def scaled(logits: Tensor, scale: float) -> Tensor:
    """``scale * logits``, as the family that published the scale computes it."""
    factor, divisor = factor_and_divisor(scale)
    return logits / divisor if factor == 1.0 else logits * factor


def factor_and_divisor(scale: float) -> tuple[float, float]:
    """A scale as ``factor / divisor``, one of which is 1: families that publish a divisor divide."""
    divisor = 1.0 / scale  # x / 6 and x * (1 / 6) differ in the last bit
    return (1.0, divisor) if abs(divisor - round(divisor)) < 1e-9 * abs(divisor) else (scale, 1.0)
