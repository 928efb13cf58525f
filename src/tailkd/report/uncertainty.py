"""How far a measured number can be from the truth: over held-out rows, task items and training seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Z95 = 1.959964
RESAMPLES = 4_999
AT_ONCE = 1 << 20  # numbers of one batch of resamples


@dataclass(frozen=True)
class Interval:
    """A 95 % interval over `number` units of the sample: "held-out rows", "items" or "seeds"."""

    low: float
    high: float
    number: int
    units: str

    @property
    def leaves_zero_out(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"[{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Difference:
    """One method's measure minus another's, with what is known of its noise.

    sample: over the held-out rows or items that both were measured on, the trained students held fixed.
    seeds: over training seeds, the rows held fixed. None where it is not known.
    """

    value: float
    sample: Interval | None = None
    seeds: Interval | None = None

    @property
    def known(self) -> list[Interval]:
        return [one for one in (self.seeds, self.sample) if one is not None]

    @property
    def widest(self) -> Interval | None:
        return max(self.known, key=lambda one: one.high - one.low, default=None)

    @property
    def real(self) -> bool | None:
        """Whether every interval that is known leaves 0 out; None without one."""
        return all(one.leaves_zero_out for one in self.known) if self.known else None


def over_rows(sums: Sequence[float], weights: Sequence[float], units: str = "held-out rows") -> Interval | None:
    """Of ``sum(sums) / sum(weights)``, by the paired bootstrap over rows; None for fewer than two.

    Rows are the unit that was drawn; tokens of one row are not independent. The interval is the percentiles of
    `RESAMPLES` ratios (`scipy.stats.bootstrap`, one seed), at the level that makes it as wide as Student's t over that
    many rows: Hesterberg (2015, The American Statistician 69:4), the expanded percentile interval.
    """
    return Interval(*_ends(tuple(sums), tuple(weights)), len(sums), units) if len(sums) > 1 else None


@lru_cache(maxsize=256)  # a page says the same difference in several places
def _ends(sums: tuple[float, ...], weights: tuple[float, ...]) -> tuple[float, float]:
    low, high = bootstrapped(sums, weights)
    return float(low), float(high)


def bootstrapped(sums: Any, weights: Any) -> tuple[Any, Any]:
    """Low and high end of `over_rows`, for samples along the last axis of arrays."""
    import numpy as np
    from scipy import stats

    def ratio(s: Any, w: Any, axis: int) -> Any:
        return s.sum(axis) / w.sum(axis)

    sums, weights = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    rows = sums.shape[-1]
    expanded = 1 - 2 * stats.norm.sf(math.sqrt(rows / (rows - 1)) * stats.t.ppf(0.975, rows - 1))
    found = stats.bootstrap(
        (sums, weights),
        ratio,
        paired=True,
        vectorized=True,
        axis=-1,
        method="percentile",
        confidence_level=float(expanded),
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // sums.size),
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def over_seeds(one: Sequence[float], other: Sequence[float], *, paired: bool) -> Interval | None:
    """Of ``mean(one) - mean(other)``, by Student's t over seeds; None where one side has fewer than two.

    paired: the values are of the same seeds in the same order; else Welch's interval for two samples.
    """
    from scipy import stats

    if min(len(one), len(other)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # seeds that all gave the same number
        test = stats.ttest_rel(one, other) if paired else stats.ttest_ind(one, other, equal_var=False)
        found = test.confidence_interval(0.95)
    return Interval(float(found.low), float(found.high), min(len(one), len(other)), "seeds")


def of_a_share(share: float, number: int, units: str = "items") -> Interval:
    """Of a mean of `number` scores in [0, 1]: Wilson's interval, which a share of 0 or 1 does not make empty."""
    centre, z = share + Z95**2 / (2 * number), Z95
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    scale = 1 + z**2 / number
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), number, units)
