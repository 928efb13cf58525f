"""F7: a disk that cannot hold the run is refused before a model is loaded; one that just can is enough."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import running
from safetensors.torch import load_file

import tailkd
from tailkd import parts
from tailkd.errors import Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.report.record import Run


def bytes_of_a_run(run: Run, keep: int) -> int:
    """What the run must have room for: one checkpoint more than it keeps, and the student."""
    weights = sum(t.nbytes for t in load_file(run.student / "model.safetensors").values())
    return weights * (3 * (keep + 1) + 1)


@pytest.mark.parametrize("fresh", [False, True])
def test_too_small(
    recipe: dict[str, Any], whole: Run, disk_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    disk = disk_of("300k")
    monkeypatch.setattr(parts.load, "load_model", None)
    needed = f"{bytes_of_a_run(whole, 2) / 1e6:.1f}"
    with pytest.raises(Refusal, match=rf"need {needed} MB, the disk has 0.3 MB free; .*another `out`"):
        tailkd.distill({**recipe, "out": str(disk / "run")}, fresh=fresh)
    assert not (disk / "run").exists()


def test_what_is_kept_counts(recipe: dict[str, Any], whole: Run, disk_of: Callable[[str], Path]) -> None:
    disk = disk_of(f"{bytes_of_a_run(whole, 1) // 1024 + 200}k")
    recipe["out"] = str(disk / "run")
    with pytest.raises(Refusal, match=r"keep fewer with training.keep_checkpoints"):
        tailkd.distill(recipe, **{"training.keep_checkpoints": 4})
    recipe["training"]["keep_checkpoints"] = 1
    running.assert_same(tailkd.distill(recipe), whole)


def test_what_lies_there_already_is_not_needed_again(
    recipe: dict[str, Any], whole: Run, disk_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of a run that was interrupted has its checkpoints on it, and is not too small for them now."""
    disk = disk_of(f"{bytes_of_a_run(whole, 2) // 1024 + 200}k")
    recipe["out"] = str(disk / "run")
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(55, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(recipe)
    assert len(list((disk / "run" / "checkpoints").glob("step-*"))) == 2
    running.assert_same(tailkd.distill(recipe), whole)
