"""What an objective may see of a teacher beyond a plain head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

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
