"""Tools that show a run: real ones where they are installed, and ones that raise, hang, exit and refuse."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd import folder
from tailkd import run as way
from tailkd.errors import Refusal
from tailkd.report.record import Run
from tailkd.track import trackers
from tailkd.track.follow import Records, numbers

TIMES = {"seconds", "tokens_per_second", "utilisation", "memory_bytes"}


def fake(place: Path, name: str, *, opening: str = "pass", logging: str = "pass") -> Path:
    """A module `name` that writes what it is told into a file, which keeps what it was told before."""
    told = place / f"{name}.jsonl"
    (place / f"{name}.py").write_text(
        f"""
import json, os, sys, time
told = {str(told)!r}
def tell(what):
    with open(told, "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def __init__(self):
        lines = [json.loads(line) for line in open(told)] if os.path.exists(told) else []
        self.step = self._next_step = 1 + max((one["step"] for one in lines if "step" in one), default=-1)
    def log(self, numbers, step):
        {logging}
        tell({{"step": step, **numbers}})
    def finish(self, **how):
        tell({{"finish": how}})
def init(**asked):
    {opening}
    run = Run()
    tell({{"init": asked}})
    return run
"""
    )
    return told


def lines(told: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.read_text().splitlines()] if told.is_file() else []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules come before those that are installed, here and in processes."""
    place = tmp_path / "tools"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(str(place))
    return place


@pytest.fixture
def shown(tmp_path: Path) -> Run:
    """A run folder of five steps, which asks for every tool."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "recipe.yaml").write_text(
        "name: shown\ntrack:\n  tensorboard: true\n  wandb: {project: p, entity: e, group: null, offline: false}\n"
        "  trackio: {project: p, space: null}\n"
    )
    evaluation = {"kind": "evaluation", "role": "student", "step": 0, "kl": 1.5, "tail_mass": {"1": 0.5}, "ece": None}
    steps = [{"kind": "step", "step": n, "samples": [0, 7], "loss": 1 / n, "skipped": "loss"} for n in range(1, 6)]
    records = [{"kind": "header", "format": 1}, evaluation, *steps]
    (place / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return Run(place)


def follow(run: Run, name: str) -> list[str]:
    """What is said of a tool while it follows a whole run to its end."""
    said: list[str] = []
    with trackers.Trackers([name], run, said.append) as tools:
        tools.follow()
    return said


def tiny(stranger: SimpleNamespace, out: Path, **track: Any) -> dict[str, Any]:
    return {**running.small(stranger, out, tokens=6 * 8 * 24, save_every_tokens=2 * 8 * 24), "track": track}


# ----- what a tool is told


def test_a_record_in_a_tool() -> None:
    step = {"kind": "step", "step": 3, "samples": [0, 7], "loss": 0.5, "floored_rows": 2, "skipped": "loss"}
    assert numbers(step) == {"train/loss": 0.5, "train/floored_rows": 2}
    evaluation = {"kind": "evaluation", "role": "teacher", "step": 0, "kl": None, "tail_mass": {"1": 0.5}}
    assert numbers(evaluation) == {"heldout/teacher/tail_mass/1": 0.5}


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "header", "format": 1}\n{"kind": "step", "step": 1}\n{"kind": "st')
    records = Records(path)
    assert [one["step"] for one in records.new()] == [1]
    assert not list(records.new())
    with path.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [one["step"] for one in records.new()] == [2]


def test_a_tool_gets_the_run_and_a_run_that_goes_on_is_the_same_one(
    stranger: SimpleNamespace, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between two saves: what was trained twice is told once, and what the tool missed is made up for."""
    told, missed = fake(tools, "wandb"), fake(tools, "trackio", opening="raise OSError('no server yet')")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    recipe = tiny(stranger, tmp_path / "run", wandb={"project": "hf_abcdefghijklmnop1234"}, trackio={})
    with monkeypatch.context() as patch:
        patch.setattr(way.Step, "__call__", cut_off())
        with pytest.raises(KeyboardInterrupt):
            tailkd.distill(recipe)
    before = [one["step"] for one in lines(told) if "train/loss" in one]
    fake(tools, "trackio")
    run = tailkd.distill(recipe)
    steps = [one["step"] for one in lines(told) if "train/loss" in one]
    assert steps == list(range(1, 7))
    assert before == [1, 2, 3]
    opened = [one["init"] for one in lines(told) if "init" in one]
    assert len({one["id"] for one in opened}) == 1
    assert opened[0]["project"] == "***"
    assert opened[0]["config"]["training"]["batch_size"] == 8
    assert [one["finish"] for one in lines(told) if "finish" in one] == [{"exit_code": 1}, {"exit_code": 0}]
    assert [one["step"] for one in lines(missed) if "train/loss" in one] == list(range(1, 7))
    assert lines(told)[-2]["heldout/student/kl"] == run.evaluation["student"]["kl"]
    assert not any(b"hf_abcdefghijklmnop1234" in path.read_bytes() for path in run.folder.rglob("*.*"))


def cut_off() -> Any:
    """A step that is the fourth to be tried dies, a step after a save."""
    real, calls = way.Step.__call__, iter(range(4))

    def step(self: Any, batch: Any) -> Any:
        if next(calls) == 3:
            time.sleep(1.5)  # so that the tool has what was trained
            raise KeyboardInterrupt
        return real(self, batch)

    return step


# ----- what a tool can do to a run


def test_tools_that_hang_and_raise_leave_a_run_as_it_is(
    stranger: SimpleNamespace,
    tmp_path: Path,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(tools, "wandb", opening="time.sleep(1e6)")
    fake(tools, "trackio", logging="raise RuntimeError(f'token={\"x\" * 30} is refused')")
    monkeypatch.setattr(trackers, "FAREWELL", 0.2)
    monkeypatch.setattr(trackers, "LOOK_EVERY", 0.0)
    plain = tailkd.distill(tiny(stranger, tmp_path / "plain"))
    started = time.monotonic()
    shown = tailkd.distill(tiny(stranger, tmp_path / "shown", wandb={}, trackio={}))
    assert time.monotonic() - started < 30
    kept = [[{k: v for k, v in one.items() if k not in TIMES} for one in run.metrics] for run in (plain, shown)]
    assert json.dumps(kept[0]) == json.dumps(kept[1])
    assert shown.evaluation == plain.evaluation
    assert json.loads((shown.folder / "exit.json").read_text())["exit_code"] == 0
    said = capsys.readouterr().err
    assert "track.wandb was not done in time and may lack the last steps; metrics.jsonl has it all" in said
    assert "RuntimeError: token=*** is refused" in said
    assert said.count("track.trackio") == 1


FAULTS = {
    "raises when it is opened": ({"opening": "raise PermissionError('401 Unauthorized')"}, "401 Unauthorized"),
    "ends the process": ({"logging": "os._exit(3)"}, "it ended with code 3"),
    "asks to exit": ({"logging": "sys.exit('goodbye')"}, "it ended with code 1"),
    "hangs": (
        {"logging": "time.sleep(1e6)", "opening": "sys.modules['__main__'].PATIENCE = 1"},
        "it did not answer",
    ),
    "is broken": ({"opening": "(("}, "SyntaxError"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_said_once(kind: str, shown: Run, tools: Path) -> None:
    how, why = FAULTS[kind]
    fake(tools, "wandb", **how)
    (said,) = follow(shown, "wandb")
    assert said.startswith("track.wandb was off at the end: ")
    assert why in said


def test_a_tool_that_gave_up_is_told_while_the_run_goes_on(
    shown: Run, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tools, "wandb", opening="raise OSError('the network is gone')")
    said: list[str] = []
    monkeypatch.setattr(trackers, "LOOK_EVERY", 0.0)
    with trackers.Trackers(["wandb"], shown, said.append) as running_tools:
        running_tools.follow()
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            running_tools.look()
            time.sleep(0.05)
    assert said == ["track.wandb is off: OSError: the network is gone. The run goes on, metrics.jsonl has it all"]


def test_a_process_that_cannot_start_is_said(shown: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "track is off: " in follow(shown, "wandb")[0]


def test_nothing_is_left_running(shown: Run, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that hangs, and the process that it started for itself."""
    started = tools / "started"
    start = f"import subprocess; p = subprocess.Popen(['sleep', '1000']); open({str(started)!r}, 'w').write(str(p.pid))"
    fake(tools, "wandb", opening=f"{start}; time.sleep(1e6)")
    monkeypatch.setattr(trackers, "FAREWELL", 2.0)
    assert "not done in time" in follow(shown, "wandb")[0]
    until = time.monotonic() + 10
    while _alive(int(started.read_text())):
        assert time.monotonic() < until
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_tool_that_is_not_installed_is_refused_before_the_start(
    stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"track.wandb needs the package wandb, which is not installed; `pip install"):
        tailkd.distill(tiny(stranger, tmp_path / "run", wandb={}))
    assert not (tmp_path / "run").exists()


def test_fresh_is_another_run_in_the_tools(shown: Run, tools: Path) -> None:
    told = fake(tools, "wandb")
    follow(shown, "wandb")
    (shown.folder / "wandb").mkdir()
    folder.clear(shown)
    assert not any(shown.folder.iterdir())
    assert lines(told)[0]["init"]["resume"] == "allow"


# ----- the real ones


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("tensorboard")
def test_tensorboard_opens_what_was_written(shown: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not follow(shown, "tensorboard")
    assert not follow(shown, "tensorboard")  # a run that goes on: nothing twice
    events = EventAccumulator(str(shown.folder / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        (n, pytest.approx(1 / n)) for n in range(1, 6)
    ]
    assert [one.value for one in events.Scalars("heldout/student/tail_mass/1")] == [0.5]


@installed("trackio")
def test_trackio_keeps_each_step_once(shown: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert not follow(shown, "trackio")
    with (shown.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 6, "loss": 0.1}\n')
    assert not follow(shown, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as rows:
        assert [step for (step,) in rows.execute("SELECT step FROM metrics ORDER BY step")] == list(range(7))


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that answers 401 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@installed("wandb")
def test_wandb_is_refused_by_its_server(
    shown: Run, refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    for name, value in {"WANDB_BASE_URL": refusing, "WANDB_API_KEY": key, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    (said,) = follow(shown, "wandb")
    assert "401" in said
    assert key not in said
    assert not any(key.encode() in path.read_bytes() for path in shown.folder.rglob("*") if path.is_file())
