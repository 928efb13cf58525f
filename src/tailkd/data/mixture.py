"""Rows of several sources as one set of rows, and which of them a sample shows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from tailkd.data.order import mixed_seed, row_of
from tailkd.data.packing import Row, Rows
from tailkd.errors import Refusal

PERIOD = 4096
"""Samples after which a weighted schedule begins anew; weights are rounded to multiples of 1 / PERIOD."""


class Mixture:
    """The rows of all `parts` one part after the other: what `Rows` is for one source.

    tokens, predicted, cut, dropped: sums over the parts.

    Without `weights` every epoch is one permutation of all rows, whatever source they are of: a sample shows row
    ``row_of(sample, len(mixture), seed)``. With weights the source of a sample follows `schedule`, turned by the seed,
    and the k-th sample of source s shows its row ``row_of(k, len(parts[s]), mixed_seed(seed, s))``: each source has
    epochs of its own, each another permutation.

    Args:
        parts: rows of the same context. names: of the sources. weights: shares of the samples, in any unit.

    Raises:
        Refusal: a weight that is less than one sample in `PERIOD`.
    """

    choice = ""  # nothing is chosen by scores of several sources

    def __init__(self, parts: Sequence[Rows], names: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self.parts, self.names, self.context = tuple(parts), tuple(names), parts[0].context
        self.borders = tuple(accumulate((len(part) for part in parts), initial=0))
        self.tokens, self.predicted = sum(part.tokens for part in parts), sum(part.predicted for part in parts)
        self.cut, self.dropped = sum(part.cut for part in parts), sum(part.dropped for part in parts)
        self.counts = None if weights is None else quotas(dict(zip(names, weights, strict=True)))

    def __len__(self) -> int:
        return self.borders[-1]

    def __getitem__(self, row: int) -> Row:
        part = self.source_of(row)
        return self.parts[part][row - self.borders[part]]

    def source_of(self, row: int) -> int:
        """The part in which a row lies."""
        return bisect_right(self.borders, row) - 1

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample of a period, and how many samples of each source lie before it."""
        assert self.counts is not None
        table = schedule(self.counts)
        seen = np.cumsum(table[:, None] == np.arange(len(self.counts)), axis=0)
        return table, np.concatenate([np.zeros_like(seen[:1]), seen])

    def samples_before(self, sample: int, seed: int) -> np.ndarray:
        """int64 (sources,): how many of the samples ``0 .. sample - 1`` show each source; weighted mixtures alone."""
        start = mixed_seed(seed, len(self.parts)) % PERIOD
        _, seen = self._table
        turns, place = divmod(start + sample, PERIOD)
        return turns * seen[-1] + seen[place] - seen[start]

    def row_shown(self, sample: int, seed: int) -> int:
        """The row that global sample number `sample` shows."""
        if self.counts is None:
            return row_of(sample, len(self), seed)
        start = mixed_seed(seed, len(self.parts)) % PERIOD
        source = int(self._table[0][(start + sample) % PERIOD])
        number = int(self.samples_before(sample, seed)[source])
        return self.borders[source] + row_of(number, len(self.parts[source]), mixed_seed(seed, source))

    def epochs(self, samples: int) -> list[float]:
        """How often each source is seen in this many samples."""
        shares = [len(part) / len(self) for part in self.parts]
        if self.counts is not None:
            shares = [count / PERIOD for count in self.counts]
        return [samples * share / len(part) for share, part in zip(shares, self.parts, strict=True)]


AnyRows = Rows | Mixture


def parts_of(rows: AnyRows) -> tuple[Rows, ...]:
    """The rows of each source."""
    return rows.parts if isinstance(rows, Mixture) else (rows,)


def row_shown(rows: AnyRows, sample: int, seed: int) -> int:
    """The row that global sample number `sample` shows: every epoch is another permutation."""
    return rows.row_shown(sample, seed) if isinstance(rows, Mixture) else row_of(sample, len(rows), seed)


def quotas(weights: dict[str, float]) -> tuple[int, ...]:
    """Samples of each source in a period: the weights as whole numbers that add up to `PERIOD` (largest remainder)."""
    exact = np.asarray(list(weights.values()), dtype=np.float64) / sum(weights.values()) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - int(counts.sum())]] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if not count:
            raise Refusal(
                f"source {name!r} has weight {weight:g} of {sum(weights.values()):g}, less than one row in {PERIOD:,}; "
                "give it more, or leave it out"
            )
    return tuple(counts.tolist())


def schedule(counts: Sequence[int]) -> np.ndarray:
    """Which source each sample of a period shows, so evenly that no prefix is a whole sample off any source's share.

    After n samples source s has been shown ``n * counts[s] / sum(counts)`` times up to ``1 - 1 / (2 * sources - 2)``,
    the least that is possible in general: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    Of the sources that lag by ``1 / (2 * sources - 2)`` or more, the one is taken that would be late first.
    """
    total, bound = sum(counts), max(2 * len(counts) - 2, 1)
    shown, table = [0] * len(counts), np.empty(total, dtype=np.int64)
    for place in range(total):
        lags = [(place + 1) * count - seen * total for count, seen in zip(counts, shown, strict=True)]  # / total
        ready = [s for s, lag in enumerate(lags) if lag * bound >= total]
        table[place] = min(ready, key=lambda s: ((bound - 1) * total - bound * lags[s]) / counts[s])
        shown[table[place]] += 1
    return table
