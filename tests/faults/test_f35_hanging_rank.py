"""F35: of two processes one dies, hangs or is slow: the other ends in time and says why, or all is well."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running
from faults.test_f04_many_processes import workers

import tailkd
from tailkd.errors import Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.report.record import Run
from tailkd.train import ranks

Processes = list[subprocess.Popen[str]]

ONE_STOPS = """
import os, signal
from tailkd.train.ranks import Ranks
ranks = Ranks.start()
ranks.wait()
if not ranks.leads:
    os.kill(os.getpid(), signal.SIGSTOP)
ranks.agreed(0)
"""


@contextmanager
def ended(processes: Processes) -> Iterator[Processes]:
    """None of them outlives the test, not even one that is stopped."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def distilling(recipe: dict[str, Any], *, timeout: float) -> Processes:
    file = Path(recipe["out"]).parent / "recipe.json.yaml"
    file.write_text(json.dumps(recipe))
    return running.start_by_hand(["-m", "tailkd", "distill", str(file)], timeout=timeout)


def test_an_exchange_that_nobody_answers() -> None:
    with ended(running.start_by_hand(["-c", ONE_STOPS], timeout=5)) as (waits, _):
        said = waits.communicate(timeout=60)[1]
    assert waits.returncode == 1
    assert "Late: rank 0 of 2 waited 5 s in vain for another process to agree whether to go on: it hangs, or" in said


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "1e999"])
def test_the_time_is_checked(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.timeout().total_seconds() == 1800
    monkeypatch.setenv("TAILKD_TIMEOUT", given)
    with pytest.raises(Refusal, match=f"TAILKD_TIMEOUT is {given!r}; expected seconds, such as 600"):
        ranks.timeout()


def test_other_errors_pass() -> None:
    """Alone nobody is waited for, whatever an error says."""
    with pytest.raises(RuntimeError, match=r"^the hub timed out$"), ranks.waiting_for("to agree"):
        raise RuntimeError("the hub timed out")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs(
    stopped: int, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has ended within twice the time, and the run goes on from what is saved."""
    seconds = 15
    recipe = running.long(stranger, tmp_path / "run", tokens=2_000 * 8 * 24)
    with ended(distilling(recipe, timeout=seconds)) as processes:
        running.wait_for_steps(tmp_path / "run", 25)
        processes[stopped].send_signal(signal.SIGSTOP)
        started, other = time.monotonic(), processes[1 - stopped]
        said = other.communicate(timeout=4 * seconds)[1]
        assert seconds - 1 < time.monotonic() - started < 2 * seconds
    assert other.returncode == 1
    assert f"Late: rank {1 - stopped} of 2 waited 15 s in vain for another process to " in said
    assert "Traceback" not in said
    saved = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved >= 20
    monkeypatch.setattr(SplitModel, "__call__", running.on_call(5, running.send(signal.SIGTERM)))
    with pytest.raises(Preempted):
        tailkd.distill(recipe)
    assert [r["step"] for r in running.records(tmp_path / "run")] == list(range(1, saved + 2))


@pytest.mark.slow
def test_a_rank_that_is_five_times_slower(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Four fifths of the time it stands still: the run only takes longer."""
    expected = tailkd.distill(running.long(stranger, tmp_path / "alone"))
    with ended(distilling(running.long(stranger, tmp_path / "run"), timeout=30)) as processes:
        running.wait_for_steps(tmp_path / "run", 3)
        while all(process.poll() is None for process in processes):
            processes[1].send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            processes[1].send_signal(signal.SIGCONT)
            time.sleep(0.05)
        said = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    ours, theirs = ([r for r in one.metrics if r["kind"] == "step"] for one in (Run(tmp_path / "run"), expected))
    assert [r["samples"] for r in ours] == [r["samples"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_dies(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """The others end too, at once; the run goes on from what is saved, on any number of processes."""
    recipe = running.long(stranger, tmp_path / "run")
    process = running.start(recipe, ranks=2)
    running.wait_for_steps(tmp_path / "run", 25)
    workers(process)[-1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(90) == 1
    assert time.monotonic() - started < 60
    assert tailkd.distill(recipe).finished
