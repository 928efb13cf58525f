"""Is a difference between two students larger than the noise of the held-out sample?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tailkd.report.record import Run

Z95 = 1.959964


@dataclass(frozen=True)
class Difference:
    """A mean difference per token (nats) with its 95 % interval over held-out rows."""

    mean: float
    low: float
    high: float
    rows: int

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired(one: Run, other: Run, measure: str) -> Difference | None:
    """Measure of `one` minus that of `other` on the same held-out rows; None where the rows are not the same.

    Equals ``sum(a - b) / sum(tokens)``; its standard error is that of a ratio over rows (rows are the unit that was
    drawn, tokens of one row are not independent). It holds the trained students fixed: what another seed would give is
    not in it.
    """
    a, b = one.heldout["student"]["rows"], other.heldout["student"]["rows"]
    if a["tokens"] != b["tokens"] or measure not in a or measure not in b or len(a["tokens"]) < 2:
        return None
    differences = [x - y for x, y in zip(a[measure], b[measure], strict=True)]
    return interval(differences, a["tokens"])


def interval(sums: Sequence[float], weights: Sequence[float]) -> Difference:
    """The ratio ``sum(sums) / sum(weights)`` with its 95 % interval over the pairs."""
    rows, total = len(sums), sum(weights)
    ratio = sum(sums) / total
    spread = sum((s - ratio * w) ** 2 for s, w in zip(sums, weights, strict=True))
    error = Z95 * math.sqrt(rows / (rows - 1) * spread) / total
    return Difference(ratio, ratio - error, ratio + error, rows)
