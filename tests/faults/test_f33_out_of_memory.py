"""F33, simulated: exit code 77 and what to change, or smaller micro-batches and the same run."""

from __future__ import annotations

from typing import Any

import pytest
import running
import torch

import tailkd
from tailkd.errors import OutOfMemory
from tailkd.models.head import SplitModel
from tailkd.report.record import Run


def limit(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Memory for so many rows of training."""
    real = SplitModel.__call__

    def call(split: SplitModel, *inputs: torch.Tensor) -> Any:
        if len(inputs[0]) > rows and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return real(split, *inputs)

    patch.setattr(SplitModel, "__call__", call)


def test_what_to_change(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        limit(patch, 2)
        with pytest.raises(OutOfMemory, match=r"4 rows of 24 tokens .*20.00 GiB.*lower training.micro_batch_size") as e:
            tailkd.distill(recipe)
    assert e.value.exit_code == 77
    assert "auto_microbatch" in str(e.value)


def test_the_same_run_in_smaller_parts(recipe: dict[str, Any], whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["auto_microbatch"] = True
    limit(monkeypatch, 1)
    run = tailkd.distill(recipe)
    ours, theirs = ([r["loss"] for r in one.metrics if r["kind"] == "step"] for one in (run, whole))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert [s[:3] for s in running.steps(run)] == [s[:3] for s in running.steps(whole)]


def test_not_even_one_row(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["auto_microbatch"] = True
    limit(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match="1 rows of 24 tokens"):
        tailkd.distill(recipe)


def test_other_errors_are_not_memory(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["auto_microbatch"] = True

    def fails() -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(SplitModel, "__call__", running.on_call(25, fails))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        tailkd.distill(recipe)
