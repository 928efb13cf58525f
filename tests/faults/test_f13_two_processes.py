"""F13: two processes on one run folder; a lock whose process died is free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tailkd
from tailkd.errors import Refusal
from tailkd.report.record import Run

HOLD = "import sys, pathlib, time; from tailkd import folder; from tailkd.report.record import Run\n"
HOLD += "with folder.locked(Run(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True); time.sleep(60)"


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_a_dead_one_is_forgotten(recipe: dict[str, Any]) -> None:
    folder = Path(recipe["out"])
    process = hold(folder)
    try:
        with pytest.raises(Refusal, match=rf"in use by process {process.pid} on .*; wait for it, stop"):
            tailkd.distill(recipe)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((folder / "lock.json").read_text())["pid"] == process.pid
    assert tailkd.distill(recipe).finished
    assert not (folder / "lock.json").exists()


def test_a_refused_run_leaves_nothing(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        assert json.loads((Path(recipe["out"]) / "lock.json").read_text())["pid"] == os.getpid()
        raise Refusal("no")

    monkeypatch.setattr("tailkd.run.build", refuse)
    with pytest.raises(Refusal):
        tailkd.distill(recipe)
    assert not Run(Path(recipe["out"])).folder.exists()
