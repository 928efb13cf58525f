"""What an objective may see of a teacher beyond a plain head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tailkd.objective import checks
from tailkd.objective.head import Head


@dataclass(frozen=True, slots=True)
class Dense:
    """Several teachers of one vocabulary as a mixture of distributions, over the student's ids.

    Equals, with ``z = head.logits()`` of each teacher::

        for source, target in fold.items():
            z[..., target] = torch.logaddexp(z[..., target], z[..., source])
        log_p = z[..., usable].log_softmax(-1)
        logits = logsumexp over the teachers of (log(weight / sum(weights)) + log_p)

    Args:
        heads: one or more `Head`s over as many vocabulary rows.
        weights: positive, one for each head; None for equal ones.
        usable: how many of the first rows the student has, or int64 ids (n,), the teacher's id of each of its rows;
            None for all.
        fold: teacher ids whose mass is added to another id's, source -> target; the target is usable.

    Raises:
        ValueError: no head, vocabularies or weights that do not fit, ids outside.
    """

    heads: tuple[Head, ...]
    weights: tuple[float, ...] | None = None
    usable: int | Tensor | None = None
    fold: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [head.vocabulary_size for head in self.heads]
        if len(set(sizes)) != 1:
            raise ValueError(f"teachers with {sizes} vocabulary rows; expected one or more over the same rows")
        if self.weights is not None and (len(self.weights) != len(sizes) or not all(w > 0 for w in self.weights)):
            raise ValueError(f"weights {self.weights} for {len(sizes)} teachers; expected a positive number for each")
        outside = [i for pair in self.fold.items() for i in pair if not 0 <= i < sizes[0]]
        if isinstance(self.usable, int) and not 0 < self.usable <= sizes[0]:
            outside.append(self.usable)
        if outside:
            raise ValueError(f"ids {outside} are outside the teacher's {sizes[0]:,} vocabulary rows")

    @property
    def vocabulary_size(self) -> int:
        """Rows that the student must have."""
        if isinstance(self.usable, Tensor):
            return len(self.usable)
        return self.heads[0].vocabulary_size if self.usable is None else self.usable

    @property
    def hidden(self) -> Tensor:
        return self.heads[0].hidden

    @property
    def log_weights(self) -> list[float]:
        """Logarithms of the weights as parts of one."""
        weights = torch.tensor(self.weights or [1.0] * len(self.heads), dtype=torch.float64)
        return (weights / weights.sum()).log().tolist()

    def to(self, dtype: torch.dtype) -> Dense:
        """The same signal, its heads in another dtype."""
        return replace(self, heads=tuple(head.to(dtype) for head in self.heads))

    def folded(self, logits: Tensor) -> Tensor:
        """Logits (..., usable ids) of one teacher from those over all its rows, which change in place."""
        for source, target in self.fold.items():
            logits[..., target] = torch.logaddexp(logits[..., target], logits[..., source])
        if self.usable is None:
            return logits
        return logits[..., : self.usable] if isinstance(self.usable, int) else logits.index_select(-1, self.usable)

    def logits(self) -> Tensor:
        """Logits of the mixture (batch, sequence, usable ids): its log-probabilities, or one teacher's own logits."""
        each = [self.folded(head.logits()) for head in self.heads]
        if len(each) == 1:
            return each[0]
        parts = [weight + z.log_softmax(-1) for weight, z in zip(self.log_weights, each, strict=True)]
        return torch.stack(parts).logsumexp(0)


@dataclass(frozen=True, slots=True)
class Cached:
    """A teacher that was written down: at each position its likeliest ids, what is left, and ids drawn from that.

    What `caching.written_down` makes of logits. From it `tail_aware` and `forward_kl` are unbiased, in value and
    gradient, over the draws; the head part, the tail mass, its mean and all of `ghost_token_kl` are exact. Of K ids any
    ``top_k`` up to K can be asked for. Positions without a label may hold anything.

    Args:
        head_ids: integers (batch, sequence, K), the K most probable ids, most probable first.
        head_log_probabilities: (batch, sequence, K), theirs.
        log_tail_mass: (batch, sequence), logarithm of the mass of all other ids; -inf where there are none.
        tail_entropy: (batch, sequence), entropy (nats) of the renormalised rest.
        tail_ids: integers (batch, sequence, draws), drawn from the renormalised rest, repeats written out.
        vocabulary_size: ids that the teacher was normalised over, those that the student has.
        temperature: by which the teacher's logits were divided.

    Raises:
        ValueError: shapes that do not fit, no draws, a temperature that is not positive.

    Source: sparse logit sampling (Anshumann et al. 2025), stratified at the top K; docs/numerics.md.
    """

    head_ids: Tensor
    head_log_probabilities: Tensor
    log_tail_mass: Tensor
    tail_entropy: Tensor
    tail_ids: Tensor
    vocabulary_size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positions = tuple(self.log_tail_mass.shape)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        lists = {"head_ids": self.top_k, "head_log_probabilities": self.top_k, "tail_ids": self.draws}
        if any(shape != positions + ((lists[name],) if name in lists else ()) for name, shape in shapes.items()):
            raise ValueError(
                f"a cached teacher of shapes {shapes}; expected (batch, sequence, K) for the head's ids and "
                "log-probabilities, (batch, sequence) for tail mass and entropy, (batch, sequence, draws) for tail ids"
            )
        if not (0 < self.top_k <= self.vocabulary_size and self.draws):
            raise ValueError(
                f"a cached teacher with {self.top_k} ids of {self.vocabulary_size:,} and {self.draws} drawn from the "
                "rest; expected 1 to all ids, and at least one draw"
            )
        checks.positive("temperature", self.temperature)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept per position, by name."""
        names = ("head_ids", "head_log_probabilities", "log_tail_mass", "tail_entropy", "tail_ids")
        return {name: getattr(self, name) for name in names}

    @property
    def top_k(self) -> int:
        """How many ids are kept with their own probability."""
        return self.head_ids.shape[-1] if self.head_ids.dim() else 0

    @property
    def draws(self) -> int:
        """How many ids were drawn from the rest."""
        return self.tail_ids.shape[-1] if self.tail_ids.dim() else 0

    def to(self, device: torch.device | str) -> Cached:
        """The same on another device."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})
