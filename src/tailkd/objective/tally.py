"""Sums and weights travel; the mean is taken once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum and the weight it stands for; adds over chunks, micro-batches and ranks.

    Equals ``Tally(a.sum() , len(a)) + Tally(b.sum(), len(b)) == Tally(cat([a, b]).sum(), len(a) + len(b))``.
    """

    sum: Tensor
    weight: float

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> float:
        """sum / weight as a Python number; 0 where nothing was counted."""
        return float(self.sum) / self.weight if self.weight else 0.0


def add(total: dict[str, Tally], more: dict[str, Tally]) -> dict[str, Tally]:
    """Two sets of named tallies as one."""
    return {**total, **{name: total[name] + tally if name in total else tally for name, tally in more.items()}}
