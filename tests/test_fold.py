"""A teacher with more vocabulary rows than its student, the probability of one of them folded into another id."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from transformers import AutoModelForCausalLM

import tailkd
from tailkd import parts, recipe_file, trial
from tailkd.data.batches import Batch, Batches, evaluation_batches
from tailkd.objective import Head, Objective, distillation_loss

ROWS, EXTRA, END = 403, 400, 1


def silent(message: str) -> None:
    """For `say`."""


@pytest.fixture
def folded(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """The student's ids are a prefix of the teacher's, which has one more special token and two rows of padding."""
    tokenizer = builders.build_tokenizer([json.loads(line)["body"] for line in stranger.corpus.open()])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end of turn|>"]})
    assert tokenizer.convert_tokens_to_ids("<|end of turn|>") == EXTRA
    sizes = {"vocabulary": ROWS, "hidden": 48, "seed": 1, "initializer_range": 0.5}
    recipe["teacher"]["model"] = str(builders.save_model(tmp_path / "wider", tokenizer, **sizes))
    recipe["vocabulary"] = {"fold": {EXTRA: END}}
    recipe["training"] |= {"tokens": 1_000, "save_every_tokens": None, "precision": "float32"}
    recipe["evaluate"] = {"tokens": 500}
    return recipe


def first_batch(recipe: dict[str, Any]) -> Batch:
    rows = parts.build(recipe_file.read(recipe), silent).train_rows
    return Batches(rows, batch_size=recipe["training"]["batch_size"], seed=recipe["training"]["seed"])[0]


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model)(input_ids=batch.input_ids, use_cache=False).logits


def head(logits: torch.Tensor) -> Head:
    """A head that has these logits."""
    return Head(logits, torch.eye(logits.shape[-1]))


def test_a_folded_vocabulary_from_the_recipe_to_the_loss(folded: dict[str, Any], stranger: SimpleNamespace) -> None:
    run = tailkd.distill(folded)
    batch = first_batch(folded)
    theirs, ours = logits(folded["teacher"]["model"], batch), logits(stranger.student, batch)
    dropped = theirs[..., :EXTRA]
    by_hand = dropped.clone()
    by_hand[..., END] = torch.log(theirs[..., END].exp() + theirs[..., EXTRA].exp())
    objective = Objective(**recipe_file.read(folded).objective.settings())
    expected, unfolded = (
        float(distillation_loss(head(ours), head(z), batch.labels, objective=objective).mean())
        for z in (by_hand, dropped)
    )
    loss = next(record["loss"] for record in run.metrics if record["kind"] == "step")
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(loss - unfolded) > 1e-3
    assert AutoModelForCausalLM.from_pretrained(run.student).config.vocab_size == EXTRA
    assert run.evaluation["student"]["kl"] < run.evaluation["student_before"]["kl"]


def test_the_teachers_own_row_is_of_what_it_teaches(folded: dict[str, Any]) -> None:
    """Its probability of the end token includes that of the folded one."""
    folded["evaluate"] = {"tokens": 300, "batch_size": 8}
    found = parts.build(recipe_file.read(folded), silent)
    (batch,) = evaluation_batches(found.heldout_rows, tokens=300, batch_size=8)
    p = logits(folded["teacher"]["model"], batch).double().softmax(-1)
    p[..., END] += p[..., EXTRA]
    p = p[..., :EXTRA] / p[..., :EXTRA].sum(-1, keepdim=True)
    valid, labels = batch.labels != -100, batch.labels.clamp(min=0)
    assert bool((batch.labels == END).any())
    expected = -p.gather(-1, labels[..., None]).squeeze(-1)[valid].log().mean()
    assert found.teacher is not None
    measured = found.measure(found.teacher).measures
    assert measured["cross_entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert measured["kl"] == pytest.approx(0, abs=1e-6)


def test_the_teacher_mass_that_is_dropped_is_told(folded: dict[str, Any]) -> None:
    """Without what is folded; without a fold all that lies beyond the student's rows."""
    rows = parts.build(recipe_file.read(folded), silent).heldout_rows
    (batch,) = evaluation_batches(rows, tokens=300, batch_size=8)
    folded["evaluate"] = {"tokens": 300, "batch_size": 8}
    probabilities = logits(folded["teacher"]["model"], batch).softmax(-1)
    for fold, first in (({EXTRA: END}, EXTRA + 1), ({}, EXTRA)):
        folded["vocabulary"] = {"fold": fold}
        found = trial.load(recipe_file.read(folded), silent)
        assert found["dropped_teacher_mass"] == pytest.approx(
            float(probabilities[..., first:].sum(-1).mean()), rel=1e-5
        )
