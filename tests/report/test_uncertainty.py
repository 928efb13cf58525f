"""Intervals: how often they call noise a difference, and how often they find one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from tailkd.report import uncertainty
from tailkd.report.uncertainty import Difference, Interval, bootstrapped, of_a_share, over_rows, over_seeds

TRIALS = 2_000
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def gaussian(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.standard_normal(shape)


def heavy(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to variance 1."""
    return generator.standard_t(3, shape) / np.sqrt(3)


def correlated(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Two models whose rows are hard for both, a hundred times as far apart as the models are."""
    hard = 5 * generator.standard_t(2.5, shape)
    one, other = (hard + 0.05 * generator.standard_normal(shape) for _ in range(2))
    return (one - other) / (0.05 * np.sqrt(2))


def sparse(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Right and wrong answers that differ in 15 % of the items."""
    return (generator.random(shape) < 0.15) * generator.choice([-1.0, 1.0], shape) / np.sqrt(0.15)


def claims(draw: Draw, rows: int, *, shift: float = 0.0) -> float:
    """Share of the trials in which 0 is outside; shift in standard errors of the mean; rows of unequal length."""
    generator = np.random.default_rng(7)
    weights = generator.integers(60, 129, (TRIALS, rows)).astype(float)
    per_token = draw(generator, (TRIALS, rows))
    error = np.sqrt((weights**2).sum(-1, keepdims=True)) / weights.sum(-1, keepdims=True)  # of variance 1 in each row
    low, high = bootstrapped((per_token + shift * error) * weights, weights)
    return float(((low > 0) | (high < 0)).mean())


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "RESAMPLES", 999)


@pytest.mark.parametrize("draw", [heavy, correlated])
def test_noise_is_called_noise_and_a_difference_is_found(draw: Draw, fewer: None) -> None:
    assert claims(draw, 30) <= 0.065
    assert claims(draw, 30, shift=3.0) >= 0.80


@pytest.mark.slow
@pytest.mark.parametrize("rows", [30, 60, 200])
@pytest.mark.parametrize("draw", [gaussian, heavy, correlated, sparse])
def test_the_same_with_all_resamples(draw: Draw, rows: int) -> None:
    assert claims(draw, rows) <= 0.065
    least = 0.79 if (draw, rows) == (sparse, 30) else 0.80  # 30 items of which 4 differ show it in 79.85 %
    assert claims(draw, rows, shift=3.0) >= least


def test_the_interval_is_of_the_ratio_of_sums() -> None:
    """Against the formula for the standard error of a ratio, with rows of unequal length; and it repeats itself."""
    generator = np.random.default_rng(0)
    weights = generator.integers(5, 40, 400).astype(float)
    sums = weights * (0.3 + 0.2 * generator.standard_normal(400))
    ratio = sums.sum() / weights.sum()
    error = np.sqrt(400 / 399 * ((sums - ratio * weights) ** 2).sum()) / weights.sum()
    found = over_rows(sums.tolist(), weights.tolist())
    assert found is not None
    half = stats.t.ppf(0.975, 399) * error
    assert found.low == pytest.approx(ratio - half, abs=0.1 * half)
    assert found.high == pytest.approx(ratio + half, abs=0.1 * half)
    uncertainty._ends.cache_clear()
    assert over_rows(sums.tolist(), weights.tolist()) == found
    assert str(found) == f"[{found.low:.4f}, {found.high:.4f}]"


def test_one_row_has_no_interval() -> None:
    assert over_rows([1.0], [2.0]) is None
    assert over_seeds([1.0], [2.0, 3.0], paired=False) is None


def test_seeds() -> None:
    """Pairs by Student's t of their differences; samples without pairs by Welch."""
    one, other = [1.0, 2.0, 3.5], [0.5, 1.7, 2.9]
    differences = np.subtract(one, other)
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / np.sqrt(3)
    found = over_seeds(one, other, paired=True)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert (found.number, found.units) == (3, "seeds")
    apart = over_seeds(one, [*other, 2.0], paired=False)
    assert apart is not None
    assert apart.low < found.low < found.high < apart.high
    same = over_seeds(one, one, paired=True)
    assert same is not None
    assert (same.low, same.high) == (0.0, 0.0)


def test_shares() -> None:
    """Wilson's interval, as scipy has it for whole numbers."""
    for right in (0, 1, 20, 50):
        theirs = stats.binomtest(right, 50).proportion_ci(method="wilson")
        ours = of_a_share(right / 50, 50)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


def test_a_difference_counts_where_every_interval_leaves_zero_out() -> None:
    out, over = Interval(0.1, 0.3, 40, "held-out rows"), Interval(-0.1, 0.5, 3, "seeds")
    assert Difference(0.2, sample=out).real is True
    assert Difference(0.2, sample=out, seeds=over).real is False
    assert Difference(0.2).real is None
    assert Difference(0.2, sample=out, seeds=over).widest is over
