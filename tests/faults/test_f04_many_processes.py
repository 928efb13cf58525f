"""F4, F15 with whole runs under torchrun: signals, and other numbers of ranks across resumes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import running
import torch
from running import long, records, wait_for_steps
from safetensors.torch import load_file

import tailkd
from tailkd.errors import Preempted
from tailkd.models.head import SplitModel

pytestmark = pytest.mark.slow


def workers(process: Any) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "tailkd" in " ".join(p.cmdline())]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_f15_one_two_one(
    strategy: str, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted on one process, on two, and finished on one: the run of one process, but for rounding."""
    expected = tailkd.distill(long(stranger, tmp_path / "alone"))
    recipe = long(stranger, tmp_path / "run", strategy=strategy)
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(70, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(recipe)
    first = len(records(tmp_path / "run"))
    process = running.start(recipe, ranks=2)
    wait_for_steps(tmp_path / "run", first + 5)
    for worker in workers(process):
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.wait(90)
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["exit_code"] == 75, ending
    second = len(records(tmp_path / "run"))
    assert first < second < 60
    run = tailkd.distill(recipe)
    ours, theirs = ([r for r in one.metrics if r["kind"] == "step"] for one in (run, expected))
    assert [r["samples"] for r in ours] == [r["samples"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    weights = [load_file(one.student / "model.safetensors") for one in (run, expected)]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-5)


def test_f04_one_of_two_is_asked_twice(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = long(stranger, tmp_path / "run")
    process = running.start(recipe, ranks=2)
    wait_for_steps(tmp_path / "run", 3)
    one = workers(process)[-1]
    one.send_signal(signal.SIGTERM)
    one.send_signal(signal.SIGTERM)
    process.wait(60)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["exit_code"] == 75
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1 + (len(records(tmp_path / "run")) > 20)
