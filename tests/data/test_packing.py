"""Rows: every token predicted once, borders where documents change, held-out documents nowhere else."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from builders import numbered_store as store
from hypothesis import given

from tailkd.data import packing
from tailkd.data.packing import IGNORED, Rows
from tailkd.errors import Refusal

END = 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 12),
    st.sampled_from([None, 0]),
    st.randoms(use_true_random=False),
)
def test_every_token_is_predicted_once_from_the_one_before(lengths, context, begin, random) -> None:
    documents = np.asarray(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    of = store(lengths)
    rows = Rows(of, documents, context=context, begin=begin, end=END)
    run = np.concatenate([of.tokens[of.offsets[d] : of.offsets[d + 1]] for d in documents])
    document = np.concatenate([np.full(lengths[d], d) for d in documents])
    predicted = []
    for row in (rows[i] for i in range(len(rows))):
        assert len(row.input_ids) == len(row.labels) == len(row.segments) == context
        valid = row.labels != IGNORED
        assert valid[: valid.sum()].all()
        predicted += row.labels[valid].tolist()
        reads = row.input_ids[valid]
        first = int(begin is not None)
        if first:
            assert reads[0] == begin
        before = [np.flatnonzero(run == label)[0] - 1 for label in row.labels[valid]][first:]
        assert (reads[first:] == run[before]).all()
        places = document[[np.flatnonzero(run == token)[0] for token in reads[first:]]]
        assert ((np.diff(row.segments[valid][first:]) != 0) == (np.diff(places) != 0)).all()
    assert predicted == run[int(begin is None) :].tolist()


def test_a_begin_token_starts_each_row() -> None:
    rows = Rows(store([4, 3]), np.arange(2), context=3, begin=0, end=END)
    assert [rows[i].input_ids.tolist() for i in range(3)] == [[0, 10, 11], [0, 13, 14], [0, END, END]]
    assert [rows[i].labels.tolist() for i in range(3)] == [[10, 11, 12], [13, 14, 15], [16, IGNORED, IGNORED]]
    assert rows[1].segments.tolist() == [0, 0, 1]


hashes = st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60)


@given(hashes, st.floats(0.01, 0.99))
def test_duplicates_never_straddle_the_split(values: list[int], fraction: float) -> None:
    array = np.asarray(values + values[:5], dtype=np.uint64)
    if len(set(values)) < 2:
        with pytest.raises(Refusal, match="held-out split needs at least 2"):
            packing.split(array, fraction)
        return
    train, held = packing.split(array, fraction)
    assert len(train)
    assert len(held)
    assert sorted([*train, *held]) == list(range(len(array)))
    assert not set(array[train]) & set(array[held])


def test_the_split_follows_content_not_position() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    held = set(values[packing.split(values, 0.1)[1]])
    assert 300 < len(held) < 500
    grown = np.concatenate([values[::-1], values + np.uint64(1)])
    assert held <= set(grown[packing.split(grown, 0.1)[1]])


def test_an_own_held_out_set_is_taken_out_of_training() -> None:
    train, held = np.asarray([5, 6, 7, 5], dtype=np.uint64), np.asarray([5, 9], dtype=np.uint64)
    assert packing.without(train, held).tolist() == [1, 2]
