"""F3, F5: SIGTERM, SIGINT or the clock anywhere in a run: saved, code 75, and the same command goes on exactly."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd.errors import Preempted
from tailkd.models.head import SplitModel
from tailkd.report.record import Run

# Forward passes of a run: 2 to prove the reading, 15 to measure both models before, then 4 a step (two micro-batches,
# teacher and student), and 10 after every fourth step.
PLACES = {"before": (3, 0), "the first step": (19, 0), "mid-step": (27, 2), "an evaluation": (38, 4), "late": (55, 7)}


@pytest.mark.parametrize("place", PLACES)
def test_f03_sigterm(place: str, recipe: dict[str, Any], whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    call, saved = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(call, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted, match=r"^SIGTERM came; the same command goes on from what is saved"):
            tailkd.distill(recipe)
    folder = Path(recipe["out"])
    assert json.loads((folder / "exit.json").read_text())["exit_code"] == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))[-1:] == ([saved] if saved else [])
    running.assert_same(tailkd.distill(recipe), whole)
    assert json.loads((folder / "exit.json").read_text())["exit_code"] == 0


def test_the_clock(recipe: dict[str, Any], whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["stop_after"] = "1m30s"
    real = time.monotonic
    with monkeypatch.context() as patch:
        later = running.on_call(26, lambda: patch.setattr(time, "monotonic", lambda: real() + 91))
        patch.setattr(SplitModel, "__call__", later)
        with pytest.raises(Preempted, match=r"training.stop_after is over; .* \(step 2\)"):
            tailkd.distill(recipe)
    running.assert_same(tailkd.distill(recipe, **{"training.stop_after": None}), whole)


@pytest.mark.slow
def test_f05_sigint_once_and_twice(stranger: SimpleNamespace, tmp_path: Path, whole: Run) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    process = running.start(recipe)
    _wait_for_steps(tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert "the same command goes on" in process.stderr.read()  # type: ignore[union-attr]
    process = running.start(recipe)
    assert process.wait(120) == 0
    running.assert_same(Run(tmp_path / "run"), whole)


def _wait_for_steps(folder: Path, number: int) -> None:
    for _ in range(600):
        if (folder / "metrics.jsonl").is_file():
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            if sum('"step"' in line[:20] for line in lines) >= number:
                return
        time.sleep(0.1)
    raise AssertionError("the run made no steps in a minute")


def test_a_second_sigint_ends_at_once(recipe: dict[str, Any]) -> None:
    """In a process of its own: the first is noted in a step that never ends, the second ends it."""
    import builders

    code = (
        "import os, signal, sys, time, json\nimport running, tailkd\nfrom tailkd.models.head import SplitModel\n"
        "def twice():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "SplitModel.__call__ = running.on_call(35, twice)\ntailkd.distill(json.loads(sys.argv[1]))\n"
    )
    code = f"import sys; sys.path.insert(0, {str(Path(running.__file__).parent)!r})\n{code}"
    started = time.monotonic()
    done = builders.fresh_python(code, json.dumps(recipe), check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert time.monotonic() - started < 50
    assert [p.name for p in (Path(recipe["out"]) / "checkpoints").glob("step-*")]
    tailkd.distill(recipe)
