"""F18, F19, F20, F23: what is not finite, or has nothing to predict, changes no weight, and is written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tailkd
from tailkd import parts
from tailkd.data.batches import Batch, Batches
from tailkd.errors import Diverged
from tailkd.objective import Head
from tailkd.report.record import Run
from tailkd.teacher.live import LiveTeacher
from tailkd.train import step as step_module

Patch = pytest.MonkeyPatch


def poison(patch: Patch, steps: range, value: float, batch_size: int = 8) -> None:
    """The teacher's hidden states hold `value` in one position of every batch of these steps."""
    real = LiveTeacher.__call__

    def call(teacher: LiveTeacher, batch: Batch) -> Head:
        head = real(teacher, batch)
        if batch.samples[0] // batch_size in steps and teacher.__dict__.get("training", True):
            head.hidden[0, 3, 5] = value
        return head

    patch.setattr(LiveTeacher, "__call__", call)


@pytest.fixture
def training_only(monkeypatch: Patch) -> None:
    """Held-out batches carry sample numbers of their own: they are left as they are."""
    monkeypatch.setattr(parts, "evaluate_heldout", _untouched(parts.evaluate_heldout))


def _untouched(measure: Callable[..., Any]) -> Callable[..., Any]:
    def call(student: Any, teacher: Any, *arguments: Any, **options: Any) -> Any:
        teacher.training = False
        try:
            return measure(student, teacher, *arguments, **options)
        finally:
            teacher.training = True

    return call


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_f18_one_step(recipe: dict[str, Any], training_only: None, monkeypatch: Patch, value: float) -> None:
    poison(monkeypatch, range(5, 6), value)
    run = tailkd.distill(recipe)
    steps = [r for r in run.metrics if r["kind"] == "step"]
    assert [r.get("skipped") for r in steps] == [None] * 5 + ["teacher's hidden states"] + [None] * 6
    assert math.isnan(steps[5]["loss"])
    assert steps[5]["samples"] == [40, 47]
    assert all(math.isfinite(r["loss"]) for r in steps if "skipped" not in r)
    assert all(torch.isfinite(t).all() for t in load_file(run.student / "model.safetensors").values())


def test_f19_three_in_a_row(recipe: dict[str, Any], training_only: None, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, range(7, 99), math.nan)
        with pytest.raises(Diverged, match=r"step 10: the teacher's hidden states was not finite, 3 times in a row"):
            tailkd.distill(recipe)
    folder = Path(recipe["out"])
    ending = json.loads((folder / "exit.json").read_text())
    assert (ending["exit_code"], ending["step"]) == (76, 10)
    newest = max((folder / "checkpoints").glob("step-*"))
    assert all(torch.isfinite(t).all() for f in newest.glob("*.safetensors") for t in load_file(f).values())
    page = (folder / "report.html").read_text()
    assert "Why did it stop?" in page
    assert "Diverged at step 10: the teacher&#39;s hidden states was not finite, 3 times in a row" in page
    assert "nan" not in page
    measured = [r for r in Run(folder).evaluations() if r["role"] == "student"]
    assert [r["step"] for r in measured] == [0, 4, 8]
    assert f"{measured[-1]['kl']:.4f}" in page
    assert (
        "Why did it stop?" not in (tailkd.distill(recipe).folder / "report.html").read_text()
    )  # the teacher is well again: it goes on


def test_a_loss_or_gradient_that_is_not_finite(recipe: dict[str, Any], monkeypatch: Patch) -> None:
    """The teacher is fine and the gradient is not: nothing of it reaches the weights or the moments."""
    real, calls = step_module.clip_gradients, iter(range(99))

    def clip(model: Any, clip_norm: float) -> Any:
        if next(calls) == 4:
            next(model.parameters()).grad[3, 3] = math.inf
        return real(model, clip_norm)

    monkeypatch.setattr(step_module, "clip_gradients", clip)
    run = tailkd.distill(recipe)
    skipped = [r for r in run.metrics if r.get("skipped")]
    assert [(r["step"], r["skipped"]) for r in skipped] == [(5, "gradient norm")]
    assert math.isfinite(skipped[0]["loss"])
    assert math.isfinite(run.evaluation["student"]["kl"])


def test_f23_a_batch_without_a_token_to_predict(recipe: dict[str, Any], monkeypatch: Patch) -> None:
    real = Batches.__getitem__

    def get(batches: Batches, number: int) -> Batch:
        batch = real(batches, number)
        if number != 2:
            return batch
        batch.labels.fill_(-100)
        return next(batch.micro_batches(len(batch)))

    monkeypatch.setattr(Batches, "__getitem__", get)
    run = tailkd.distill(recipe)
    record = next(r for r in run.metrics if r["kind"] == "step" and r["step"] == 3)
    assert record["skipped"] == "no token to predict"
    assert (record["loss"], record["gradient_norm"]) == (0.0, 0.0)
    assert len([r for r in run.metrics if r.get("skipped")]) == 1
