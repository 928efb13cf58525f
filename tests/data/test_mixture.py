"""Rows of several sources: which source and which row a sample shows."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from builders import numbered_store as store
from hypothesis import given

from tailkd.data.batches import Batches, evaluation_batches, row_of
from tailkd.data.mixture import PERIOD, Mixture, quotas, schedule
from tailkd.data.packing import Rows
from tailkd.errors import Refusal


def rows(*lengths: int) -> Rows:
    return Rows(store(list(lengths)), np.arange(len(lengths)), context=5, begin=None, end=1)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_no_prefix_is_a_whole_sample_off_any_share(counts: list[int]) -> None:
    table, total = schedule(counts), sum(counts)
    seen = np.cumsum(table[:, None] == np.arange(len(counts)), axis=0)
    shares = np.arange(1, total + 1)[:, None] * np.asarray(counts) / total
    assert np.abs(seen - shares).max() <= 1 - 1 / max(2 * len(counts) - 2, 1) + 1e-9
    assert seen[-1].tolist() == counts


def test_without_weights_all_rows_are_permuted_together() -> None:
    parts = [rows(40, 11), rows(9), rows(30)]
    mixture = Mixture(parts, "abc")
    assert len(mixture) == sum(map(len, parts)) == 10 + 2 + 6
    shown = [mixture.row_shown(sample, 3) for sample in range(2 * len(mixture))]
    assert shown == [row_of(sample, len(mixture), 3) for sample in range(2 * len(mixture))]
    assert sorted(shown[: len(mixture)]) == sorted(shown[len(mixture) :]) == list(range(len(mixture)))
    for row in range(len(mixture)):
        part = mixture.source_of(row)
        assert mixture[row].labels.tolist() == parts[part][row - mixture.borders[part]].labels.tolist()
    assert mixture.epochs(36) == [2.0, 2.0, 2.0]


def test_one_source_without_weights_is_that_source() -> None:
    alone, mixture = rows(40, 11, 3), Mixture([rows(40, 11, 3)], "a")
    for step in range(3):
        plain, mixed = (Batches(one, batch_size=4, seed=7)[step] for one in (alone, mixture))
        assert plain.input_ids.tolist() == mixed.input_ids.tolist()
    of_both = [list(evaluation_batches(one, tokens=None, batch_size=3)) for one in (alone, mixture)]
    assert [b.labels.tolist() for b in of_both[0]] == [b.labels.tolist() for b in of_both[1]]


def test_weights_are_the_shares_of_the_samples_and_each_source_has_its_own_epochs() -> None:
    parts = [rows(40, 11), rows(9), rows(30)]
    mixture = Mixture(parts, "abc", (6, 1, 1))
    shown = [mixture.row_shown(sample, 3) for sample in range(2 * PERIOD)]
    of_source = [[row for row in shown if mixture.source_of(row) == source] for source in range(3)]
    assert [len(found) for found in of_source] == [2 * PERIOD * 6 // 8, 2 * PERIOD // 8, 2 * PERIOD // 8]
    for source, found in enumerate(of_source):
        size, border = len(parts[source]), mixture.borders[source]
        for start in range(0, len(found) - size, size):
            assert sorted(found[start : start + size]) == list(range(border, border + size))
    first, second = of_source[0][:10], of_source[0][10:20]
    assert first != second
    counted = Counter(mixture.source_of(row) for row in shown[:80])
    assert all(abs(counted[source] - 80 * share / 8) <= 1 for source, share in enumerate((6, 1, 1)))
    assert mixture.epochs(PERIOD) == pytest.approx([3072 / 10, 512 / 2, 512 / 6])


def test_a_sample_is_a_pure_function_of_seed_and_number() -> None:
    mixture = Mixture([rows(40, 11), rows(30)], "ab", (2, 1))
    late = [mixture.row_shown(sample, 5) for sample in range(10 * PERIOD, 10 * PERIOD + 50)]
    assert late == [Mixture([rows(40, 11), rows(30)], "ab", (2, 1)).row_shown(10 * PERIOD + i, 5) for i in range(50)]
    orders = [[mixture.row_shown(sample, seed) for sample in range(50)] for seed in (5, 6)]
    assert orders[0] != orders[1]
    for sample in (0, 1, 17, PERIOD, 3 * PERIOD + 5):
        counted = Counter(mixture.source_of(mixture.row_shown(s, 5)) for s in range(sample))
        assert mixture.samples_before(sample, 5).tolist() == [counted[0], counted[1]]
    # Pinned: another order would silently change every run that is resumed with a newer version.
    assert orders[0][:8] == [12, 0, 8, 15, 2, 3, 10, 4]


def test_weights_become_whole_numbers() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}) == (1366, 1365, 1365)
    assert quotas({"a": 0.25, "b": 0.75}) == (1024, 3072)
    with pytest.raises(Refusal, match=r"source 'b' has weight 0.0001 of 1.0001, less than one row in 4,096"):
        quotas({"a": 1, "b": 0.0001})
