"""What is kept of scores: the published vectors, corpus order, views of rows."""

from __future__ import annotations

import numpy as np
import pytest
import stepping
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailkd.data.batches import Batches, collate
from tailkd.data.packing import Rows
from tailkd.data.select import Kept, WithReference, difference, excess_weights, share_of
from tailkd.errors import Refusal


def test_the_vector_of_miniplm() -> None:
    teacher, reference = np.array([2, 3, 1.5, 4]), np.array([2.6, 3.1, 1.4, 5])
    assert reference - teacher == pytest.approx([0.6, 0.1, -0.1, 1.0])
    assert difference(teacher, reference, 0.5).tolist() == [0, 3]
    assert difference(teacher, reference, 0.75).tolist() == [0, 1, 3]
    assert difference(teacher, reference, 1.0).tolist() == [0, 1, 2, 3]
    assert difference(teacher, reference, 0.99).tolist() == [0, 1, 3]  # int(3.96)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40), st.floats(0.5, 1.0))
def test_corpus_order_and_ties(values: list[float], ratio: float) -> None:
    teacher, reference = np.zeros(len(values)), np.array(values)
    kept = difference(teacher, reference, ratio)
    assert kept.tolist() == sorted(sorted(range(len(values)), key=lambda i: -values[i])[: int(ratio * len(values))])


def test_scores_that_choose_nothing() -> None:
    two = np.zeros(2)
    with pytest.raises(
        Refusal, match=r"scores of 2 rows by the teacher and of 3 by the reference; expected two scorin"
    ):
        difference(two, np.zeros(3), 0.5)
    with pytest.raises(Refusal, match=r"the scores of 1 rows are not finite, the first of row 1; score again in"):
        difference(two, np.array([0, np.nan]), 0.5)
    with pytest.raises(Refusal, match=r"data.select.ratio 0.4 of 2 rows keeps none; give a larger ratio"):
        difference(two, two, 0.4)


def test_the_vector_of_rho_1() -> None:
    losses, reference = torch.tensor([2, 0.5, 3, 1, 4]), torch.tensor([1, 0.45, 2.9, 1.2, 1.5])
    assert (losses - reference).tolist() == pytest.approx([1, 0.05, 0.1, -0.2, 2.5])
    weights = excess_weights(losses.requires_grad_(), reference, (0, 5), 0.6)
    assert weights.tolist() == [1, 0, 1, 0, 1]
    assert not weights.requires_grad
    assert float((weights * losses.detach()).sum() / share_of(5, 0.6)) == 3.0


def test_by_row() -> None:
    losses = torch.tensor([5.0, 5, 5, 1, 2, 9, 9])
    weights = excess_weights(losses, torch.zeros(7), (0, 3, 5, 5, 6, 7), 0.5)
    assert weights.tolist() == [1, 0, 0, 0, 1, 1, 1]  # of equal ones the first; of one position that one
    assert [share_of(n, 0.5) for n in (0, 1, 2, 3, 5)] == [0, 1, 1, 1, 2]


def test_kept_rows_are_those_rows() -> None:
    rows = stepping.rows([20, 13, 31, 9, 33])
    for kept, predicted in (([0, 2, 5], 42), ([1, 7], 14 + rows.predicted - 7 * 14)):
        view = Kept(rows, np.array(kept))
        assert (len(view), view.context, view.predicted) == (len(kept), 14, predicted)
        assert predicted == sum(int((view[i].labels != -100).sum()) for i in range(len(view)))
        for place, number in enumerate(kept):
            assert np.array_equal(view[place].input_ids, rows[number].input_ids)
    assert Kept(rows, np.array([0, 2])).choice != Kept(rows, np.array([0, 3])).choice != rows.choice == ""
    seen = {tuple(ids) for step in range(2) for ids in Batches(view, batch_size=2, seed=1)[step].input_ids.tolist()}
    assert seen == {tuple(rows[number].input_ids.tolist()) for number in (1, 7)}


def test_a_batch_carries_the_losses() -> None:
    rows: Rows = stepping.rows([20, 13, 31, 9, 33])
    losses = np.arange(len(rows) * 14, dtype=np.float32).reshape(len(rows), 14)
    view = WithReference(rows, losses, 0.6)
    batch = collate([view[i] for i in (3, 1, 7)], (0, 1, 2))
    assert batch.reference is not None
    assert torch.equal(batch.reference, torch.from_numpy(losses[[3, 1, 7]]))
    counts = [int((rows[i].labels != -100).sum()) for i in (3, 1, 7)]
    assert batch.learned_count == sum(share_of(count, 0.6) for count in counts) < batch.count == sum(counts)
    parts = list(batch.micro_batches(2))
    assert [torch.equal(p.reference, batch.reference[s]) for p, s in zip(parts, (slice(2), slice(2, 3)), strict=True)]
    assert sum(part.learned_count for part in parts) == batch.learned_count
