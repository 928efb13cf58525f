"""The two sides of the chunked loss: products with a vocabulary matrix, some positions at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailkd.objective.blocks import LOW
from tailkd.objective.head import Head, scaled
from tailkd.objective.signal import Dense


@dataclass(frozen=True, slots=True)
class Side:
    """A head's tensors with the valid positions packed: hidden (n, width), weight in the products' dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    may_be_infinite: bool
    """-inf comes in through the bias alone (padded rows); asking costs nothing on a CPU, and a pass is dear there."""

    @staticmethod
    def of(head: Head, valid: Tensor) -> Side:
        hidden = head.hidden.detach().flatten(0, -2)
        if len(valid) < len(hidden):  # else they are all of them, in order
            hidden = hidden.index_select(0, valid)
        bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
        infinite = bias is not None and (bias.device.type != "cpu" or not bool(torch.isfinite(bias).all()))
        return Side(hidden, head.weight.detach().to(hidden.dtype), bias, head.scale, head.softcap, infinite)

    @property
    def bytes_per_id(self) -> int:
        """Bytes that a position's products take for each id."""
        return self.hidden.element_size()

    def products(self, start: int, stop: int) -> Tensor:
        """hidden @ weight.T + bias of some positions: logits before scale and soft-cap."""
        hidden = self.hidden[start:stop]
        return hidden @ self.weight.T if self.bias is None else torch.addmm(self.bias, hidden, self.weight.T)

    def widen(self, products: Tensor, out: Tensor) -> Tensor:
        """Logits of a block in the wide dtype: in the products' own place where they have it, else in `out`."""
        logits = products if products.dtype == out.dtype else out.copy_(products)
        if self.scale != 1.0:
            logits.copy_(scaled(logits, self.scale))
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.clamp_(min=LOW) if self.may_be_infinite else logits

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """d logits / d products, of logits in the wide dtype; None for 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Mixture:
    """A teacher whose logits are made of more than one product: several heads, or ids folded into others."""

    dense: Dense
    sides: tuple[Side, ...]
    wide: torch.dtype
    scale = 1.0
    softcap = None

    @property
    def bytes_per_id(self) -> int:
        return 3 * self.wide.itemsize  # what is added up, what comes in, and its products

    def products(self, start: int, stop: int) -> Tensor:
        """Finished logits in the wide dtype."""
        if len(self.sides) == 1:
            return self._logits(self.sides[0], start, stop)
        total: Tensor | None = None
        for log_weight, side in zip(self.dense.log_weights, self.sides, strict=True):
            part = self._logits(side, start, stop)
            part -= part.logsumexp(1, keepdim=True) - log_weight
            total = part if total is None else torch.logaddexp(total, part, out=total)
        assert total is not None
        return total

    def _logits(self, side: Side, start: int, stop: int) -> Tensor:
        products = side.products(start, stop)
        return self.dense.folded(side.widen(products, products.to(self.wide))).contiguous()

    def widen(self, products: Tensor, out: Tensor) -> Tensor:
        return products.clamp_(min=LOW)


def side_of(signal: Head | Dense, valid: Tensor, wide: torch.dtype) -> Side | Mixture:
    """A signal's products; of one head without folded ids only the usable rows are multiplied."""
    if isinstance(signal, Head):
        return Side.of(signal, valid)
    if len(signal.heads) == 1 and not signal.fold and isinstance(signal.usable, int | None):
        return Side.of(signal.heads[0].narrow(signal.vocabulary_size), valid)
    return Mixture(signal, tuple(Side.of(head, valid) for head in signal.heads), wide)
