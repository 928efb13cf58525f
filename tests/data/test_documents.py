"""Whole documents in rows: what is cut, and that none knows of its neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import builders
import families
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM

from tailkd.data.batches import Batch, collate
from tailkd.data.documents import OPEN, DocumentRows, first_fit
from tailkd.data.packing import IGNORED, Row
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import evaluate
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.teacher.live import LiveTeacher
from tailkd.train.step import accumulate_gradients

END, BEGIN, VOCABULARY = 1, 0, 72


def store(lengths: list[int], masks: list[list[int]] | None = None) -> Any:
    """Documents with a number per token; of masks, only the ones are learned."""
    made = builders.numbered_store(lengths)
    if masks is not None:
        made.loss = np.asarray([one for mask in masks for one in mask], dtype=np.uint8)
    return made


def rows_of(of: Any, *, context: int, begin: int | None = BEGIN) -> DocumentRows:
    return DocumentRows(of, np.arange(len(of.offsets) - 1), context=context, begin=begin, end=END)


# ----- which tokens stand where


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 30))
def test_first_fit(sizes: list[int], capacity: int) -> None:
    rows = first_fit(np.asarray(sizes, dtype=np.int64), capacity)
    room: list[int] = []
    for size, row in zip(sizes, rows.tolist(), strict=True):
        fits = [number for number, left in enumerate(room) if left >= size]
        assert row == (fits[0] if fits else len(room))
        if row == len(room):
            room.append(capacity)
        room[row] -= size
    assert first_fit(np.asarray([9] + [10] * OPEN + [1]), 10).tolist() == [*range(OPEN + 1), OPEN + 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 15), st.sampled_from([None, BEGIN]))
def test_every_token_is_predicted_once_inside_its_document(lengths: list[int], context: int, begin: int | None) -> None:
    of = store(lengths)
    rows, predicted = rows_of(of, context=context, begin=begin), []
    for row in (rows[number] for number in range(len(rows))):
        assert row.positions is not None
        assert ((row.positions == 0)[1:] == (np.diff(row.segments) != 0)).all()
        for segment in np.unique(row.segments):
            place = row.segments == segment
            reads, labels = row.input_ids[place], row.labels[place]
            assert (row.positions[place] == np.arange(place.sum())).all()
            if (labels == IGNORED).all():
                assert (reads == END).all()
                continue
            predicted += labels.tolist()
            assert (labels[:-1] == reads[1:]).all()
            assert reads[0] == (labels[0] - 1 if begin is None else BEGIN)
            document = np.searchsorted(of.offsets, labels - 10, side="right")
            assert (document == document[0]).all()
    skipped = set() if begin is not None else {10 + int(start) for start in of.offsets[:-1]}
    assert sorted(predicted) == [token for token in of.tokens.tolist() if token not in skipped]
    assert rows.predicted == len(predicted)
    assert rows.cut == rows.dropped == 0


def test_a_begin_token_that_is_there_is_not_doubled() -> None:
    of = store([4, 3])
    of.tokens[0] = BEGIN
    row = rows_of(of, context=8)[0]
    assert row.input_ids.tolist() == [BEGIN, 11, 12, BEGIN, 14, 15, END, END]
    assert row.labels.tolist() == [11, 12, 13, 14, 15, 16, IGNORED, IGNORED]


def shown(lengths: list[int], masks: list[list[int]], **settings: Any) -> tuple[list[tuple[list[int], list[int]]], Any]:
    rows = rows_of(store(lengths, masks), **settings)
    return [(rows[n].input_ids.tolist(), rows[n].labels.tolist()) for n in range(len(rows))], rows


def test_an_example_that_is_too_long_loses_the_left_of_its_prompt() -> None:
    found, rows = shown([8], [[0, 0, 0, 0, 0, 1, 1, 1]], context=5)
    assert found == [([BEGIN, 13, 14, 15, 16], [IGNORED, IGNORED, 15, 16, 17])]
    assert (rows.cut, rows.dropped) == (1, 0)
    found, rows = shown([8], [[0, 0, 0, 0, 0, 1, 1, 1]], context=5, begin=None)
    assert found == [([12, 13, 14, 15, 16], [IGNORED, IGNORED, 15, 16, 17])]


def test_an_answer_that_the_cut_goes_through_is_read_and_not_learned() -> None:
    found, rows = shown([9], [[0, 0, 1, 1, 1, 0, 0, 1, 1]], context=5)
    assert found == [([BEGIN, 14, 15, 16, 17], [IGNORED, IGNORED, IGNORED, 17, 18])]
    assert (rows.cut, rows.dropped) == (1, 0)


def test_an_answer_without_room_is_left_out() -> None:
    """Also where the cut falls exactly in front of its last answer, which then stays."""
    found, rows = shown([8, 3], [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1]], context=5)
    assert found == [([BEGIN, 18, 19, END, END], [IGNORED, 19, 20, IGNORED, IGNORED])]
    assert (rows.cut, rows.dropped) == (0, 1)
    found, rows = shown([8], [[0, 0, 0, 1, 1, 1, 1, 1]], context=5)
    assert found == [([BEGIN, 13, 14, 15, 16], [13, 14, 15, 16, 17])]
    assert (rows.cut, rows.dropped) == (1, 0)


# ----- alone, padded, packed


def model(family: str, attention: str, seed: int, **other: Any) -> Any:
    torch.manual_seed(seed)
    windows = {"sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
    own = windows if family == "Gemma2" else {}
    config = families.tiny(family, initializer_range=0.3, **own, **other)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


KINDS = (("Llama", "eager"), ("Llama", "sdpa"), ("Gemma2", "eager"))
LENGTHS, PROMPTS = [9, 14, 5, 17, 11, 3], [3, 6, 1, 9, 2, 1]


def examples() -> Any:
    made = store(LENGTHS, [[0] * p + [1] * (n - p) for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    made.tokens = np.random.default_rng(0).integers(2, VOCABULARY, len(made.tokens))
    return made


def packed() -> Batch:
    rows = rows_of(examples(), context=24)
    assert len(rows) < len(LENGTHS)
    return collate([rows[n] for n in range(len(rows))], range(len(rows)))


def one_by_one(*, padded_to: int = 0) -> list[Batch]:
    """Every example in a plain row of its own, which ends with it or is filled up."""
    of, rows = examples(), []
    for start, stop in zip(of.offsets[:-1], of.offsets[1:], strict=True):
        tokens, learned = of.tokens[start:stop], of.loss[start:stop].astype(bool)
        padding = max(0, padded_to - len(tokens))
        reads = np.concatenate([[BEGIN], tokens[:-1], np.full(padding, END)])
        labels = np.concatenate([np.where(learned, tokens, IGNORED), np.full(padding, IGNORED)])
        rows.append(Row(reads, labels, np.zeros_like(reads)))
    if padded_to:
        return [collate(rows, range(len(rows)))]
    return [collate([row], [0]) for row in rows]


def gradients(models: SimpleNamespace, batches: list[Batch], objective: Objective) -> tuple[torch.Tensor, float]:
    models.student.model.zero_grad()
    count, loss = sum(batch.count for batch in batches), 0.0
    for batch in batches:
        found = accumulate_gradients(
            models.student, models.teacher, batch, objective=objective, micro_batch_size=2, divisor=count
        )
        loss += float(found["loss"].sum)
    return torch.cat([p.grad.flatten() for p in models.student.plain.parameters()]), loss / count


def keep_float64(patch: pytest.MonkeyPatch) -> None:
    """Transformers' eager attention and Gemma's norms round float64 to float32: noise of 1e-8 between two shapes."""
    softmax, narrowed = torch.nn.functional.softmax, torch.Tensor.float

    def in_its_precision(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return softmax(scores, dim=dim, dtype=torch.promote_types(scores.dtype, dtype))

    patch.setattr(torch.nn.functional, "softmax", in_its_precision)
    patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else narrowed(t))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("divergence", ["tail_aware", "forward_kl", "none"])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_packed_padded_and_one_by_one_are_the_same(
    family: str, attention: str, divergence: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float64(monkeypatch)
    student = SplitModel(model(family, attention, 1).to(dtype))
    teacher = LiveTeacher(model(family, attention, 2).to(dtype), usable=VOCABULARY)
    models, objective = SimpleNamespace(student=student, teacher=teacher), Objective(divergence=divergence, top_k=3)
    expected, loss = gradients(models, one_by_one(), objective)
    assert loss > 1
    for batches in ([packed()], one_by_one(padded_to=20)):
        found, same = gradients(models, batches, objective)
        assert same == pytest.approx(loss, rel=tolerance)
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def test_held_out_measures_are_those_of_documents_alone() -> None:
    student = SplitModel(model("Llama", "sdpa", 1))
    teacher = LiveTeacher(model("Llama", "sdpa", 2), usable=VOCABULARY)
    alone, together = (evaluate(student, teacher, b, top_k=3).measures for b in (one_by_one(), [packed()]))
    assert alone["tokens"] == together["tokens"] == sum(LENGTHS) - sum(PROMPTS)
    for name in ("cross_entropy", "kl", "tail_kl", "acceptance", "full_ece"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize(("family", "attention"), [*KINDS, ("Qwen2", "sdpa"), ("Phi", "sdpa"), ("Phi3", "eager")])
def test_a_changed_neighbour_leaves_logits_as_they_are(family: str, attention: str) -> None:
    split, batch = SplitModel(model(family, attention, 1)).prove_documents(), packed()
    assert batch.position_ids is not None
    changed, place = batch.input_ids.clone(), batch.segments == 1
    assert place.any(1).all()
    changed[place] = (changed[place] + 7) % VOCABULARY
    before, after = (split(ids, batch.position_ids).logits() for ids in (batch.input_ids, changed))
    assert torch.equal(before[~place], after[~place])
    assert not torch.isclose(before[place], after[place]).all(-1).any()
    unmasked = split(batch.input_ids).logits()
    assert not torch.allclose(unmasked[batch.segments > 1], before[batch.segments > 1], atol=1e-2)


def test_a_model_that_looks_over_the_border_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose backbone drops the positions that it is given, as families do that count for themselves."""
    split = SplitModel(model("Llama", "sdpa", 1))
    forward = split.backbone.forward
    monkeypatch.setattr(split.backbone, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    with pytest.raises(Refusal, match=r"LlamaForCausalLM .* with attention 'sdpa' a token sees the document before"):
        split.prove_documents()


def test_the_mean_tail_mass_is_of_a_document() -> None:
    """And of a row where rows are one sequence."""
    batch = packed()
    assert batch.sequences is batch.segments
    assert all(part.sequences is not None for part in batch.micro_batches(1))
    assert torch.equal(batch.part(1, len(batch)).position_ids, batch.position_ids[1:2])  # type: ignore[index]
    assert one_by_one(padded_to=20)[0].sequences is None
