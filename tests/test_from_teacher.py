"""A student cut out of its teacher, through the recipe: trained, saved, resumed, measured."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tailkd
from tailkd.errors import Refusal

CUT = {"layers": 1, "intermediate_size": 40, "embeddings": "copy", "freeze_embeddings": True}


def cut(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**recipe, "student": {"from_teacher": {**CUT, **changes}}}


def test_trained_with_frozen_embeddings_and_the_cosine_loss(recipe: dict[str, Any], stranger: SimpleNamespace) -> None:
    recipe = cut(recipe)
    recipe["objective"]["hidden"] = {"weight": 5.0}
    recipe["training"]["learning_rate"] = 1e-2
    run = tailkd.distill(recipe)
    student = AutoModelForCausalLM.from_pretrained(run.student)
    teacher = AutoModelForCausalLM.from_pretrained(stranger.teacher)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert student.config.num_hidden_layers == 1
    steps = [record for record in run.metrics if record["kind"] == "step"]
    for step in steps:
        whole = step["clm"] + step["divergence"] + 5.0 * step["hidden"]
        assert step["loss"] == pytest.approx(whole, rel=1e-5)
    assert steps[-1]["hidden"] < steps[0]["hidden"]
    assert "cut out of" in (run.folder / "README.md").read_text()


def test_projections_are_trained_and_stay_out_of_the_student(recipe: dict[str, Any]) -> None:
    recipe = cut(recipe, hidden_size=32, embeddings="slice", freeze_embeddings=False)
    recipe["objective"]["hidden"] = {"pairs": [[1, 2], [0, 0]], "project": True}
    run = tailkd.distill(recipe)
    losses = [record["hidden"] for record in run.metrics if record["kind"] == "step"]
    assert losses[-1] < losses[0]
    report = AutoModelForCausalLM.from_pretrained(run.student, output_loading_info=True)[1]
    assert not any(report.values())


def test_unequal_widths_need_a_projection(recipe: dict[str, Any]) -> None:
    recipe = cut(recipe, hidden_size=32, embeddings="slice")
    recipe["objective"]["hidden"] = {}
    with pytest.raises(Refusal, match=r"width 32 \(student\) and 48 \(teacher\); set objective.hidden.project: true"):
        tailkd.distill(recipe)


def test_the_same_start_without_a_divergence(recipe: dict[str, Any]) -> None:
    """The baseline that only sees the corpus begins where the distilled student begins."""
    plain = cut({**recipe, "objective": {"divergence": "none"}, "out": recipe["out"] + "-clm"})
    measured = [tailkd.distill(one).evaluation["student_before"]["kl"] for one in (cut(recipe), plain)]
    assert measured[0] == measured[1]


def test_folded_ids_keep_their_probability(recipe: dict[str, Any], stranger: SimpleNamespace) -> None:
    rows = json.loads((stranger.teacher / "config.json").read_text())["vocab_size"]
    with pytest.raises(Refusal, match=rf"vocabulary.fold: {rows - 1}: 2 adds .*expected one of {rows:,}"):
        tailkd.distill({**recipe, "vocabulary": {"fold": {rows - 1: 2}}})
