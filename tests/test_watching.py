"""What a run says while it runs: the live line, plain lines, `tailkd status`, and docs/watching.md."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from typer.testing import CliRunner

import tailkd
from tailkd import bill, cli, folder, ledger, recipe_file
from tailkd.errors import Refusal
from tailkd.ledger.peak import measured_peak
from tailkd.report import status as standing
from tailkd.report import terminal
from tailkd.report.progress import duration, seconds_left, size_shown, step_line
from tailkd.report.record import Run
from tailkd.report.terminal import Terminal

PAGE = Path(__file__).parents[1] / "docs" / "watching.md"


def step(number: int, **more: Any) -> dict[str, Any]:
    """A step record, two seconds after the one before."""
    return {
        "kind": "step",
        "step": number,
        "tokens": 100 * number,
        "samples": [0, 7],
        "loss": 2.0,
        "clm": 1.5,
        "divergence": 0.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.8,
        "tokens_per_second": 12_345.6,
        "seconds": 2.0 * number,
        "skipped_updates": 0,
        **more,
    }


# ----- words


def test_the_line_of_a_step() -> None:
    short = "loss 2.0000  clm 1.5000  divergence 0.5000  lr 1.00e-03  grad 0.800  12,346 tok/s"
    assert step_line(step(1)) == short
    full = step(1, utilisation=0.314, memory_bytes=3_200_000_000, skipped_updates=2)
    assert step_line(full, 245) == f"{short}  31 % of peak  3.2 GB  2 skipped  4 min 05 s left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3_599.6, "1 h 00 min"),
        (22_200, "6 h 10 min"),
        (4 * 3_600 + 3 * 86_400, "3 d 04 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_time_left() -> None:
    assert seconds_left([], 10) is None
    assert seconds_left([step(3)], 10) is None
    assert seconds_left([step(3), step(4), step(6)], 10) == 8.0
    assert (size_shown(14e6), size_shown(3.25e9)) == ("14.0 MB", "3.2 GB")


# ----- the line


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)) + 100)
    with Terminal(steps=6, name="run") as shown:
        for number in range(1, 7):
            shown.step(step(number))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["run: step 1/6", "run: step 4/6", "run: step 6/6"]
    assert lines[1].endswith("4 s left")
    assert "\x1b" not in "".join(lines)


def written_to(columns: str | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What three steps write to a pseudo-terminal, which has no width of its own."""
    ours, theirs = pty.openpty()
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", kind)
    with os.fdopen(theirs, "w") as screen, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        with Terminal(steps=3, name="run") as shown:
            for number in range(1, 4):
                shown.step(step(number))
            shown.say("a message between")
    found = b""
    with os.fdopen(ours, "rb", buffering=0) as read, suppress(OSError):  # an error is how its end is told
        while more := read.read(1 << 16):
            found += more
    return found.decode()


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = written_to("100", "xterm", monkeypatch)
    assert "\x1b[" in found
    assert "step 3/3" in found
    assert "run: a message between" in found


@pytest.mark.parametrize(("columns", "kind"), [(None, "xterm"), ("0", "xterm"), ("100", "dumb")])
def test_no_escape_codes_where_nothing_can_be_redrawn(
    columns: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written_to(columns, kind, monkeypatch)
    assert "\x1b" not in found
    assert "run: step 3/3  loss 2.0000" in found


def test_a_stream_without_a_width_is_no_terminal() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    console = terminal.Console(file=Screen(), force_terminal=True)
    assert not terminal._can_be_redrawn(console)


# ----- utilisation


def test_the_best_speed_is_the_ledgers(recipe: dict[str, Any]) -> None:
    recipe["hardware"] = {"peak_flops": 1e12, "utilisation": 0.5, "devices": 3}
    read, cpu = recipe_file.read(recipe), torch.device("cpu")
    billed = bill.bill(read)
    assert bill.best_speed(read, cpu, 2) == pytest.approx(2 * 1e12 / (billed.executed.total * 1e9), rel=1e-12)
    del recipe["hardware"]
    peak = measured_peak(cpu, torch.float32)
    found = bill.best_speed(recipe_file.read(recipe), cpu, 1)
    assert found == pytest.approx(peak / (billed.executed.total * 1e9))
    assert 1e8 < peak < 1e14


def test_a_model_that_the_ledger_cannot_count_has_no_best_speed(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*given: Any) -> None:
        raise Refusal("experts, say")

    monkeypatch.setattr(ledger, "stages", unknown)
    assert bill.best_speed(recipe_file.read(recipe), torch.device("cpu"), 1) is None


# ----- status


def place(tmp_path: Path, *records: dict[str, Any], torn: str = "") -> Run:
    """A run folder of ten steps of a hundred tokens, with these records."""
    run = Run(tmp_path / "run")
    (run.folder / "checkpoints" / "step-000000004").mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(
        "name: watched\ndata: {context: 10}\ntraining: {tokens: 1000, batch_size: 10}\n"
    )
    lines = [json.dumps(one) + "\n" for one in ({"kind": "header", "format": 1}, *records)]
    (run.folder / "metrics.jsonl").write_text("".join(lines) + torn)
    return run


EVALUATION = {"kind": "evaluation", "role": "student", "step": 0, "tokens_trained": 0, "cross_entropy": 6.0, "kl": 2.0}


def test_a_run_that_another_process_trains(tmp_path: Path) -> None:
    run = place(tmp_path, EVALUATION, step(1), step(2), step(3, utilisation=0.5, memory_bytes=2e9), torn='{"kind": "s')
    with folder.locked(run):
        found = standing.status(run)
        on_disk = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert found["state"] == "running"
    assert (found["step"], found["steps"], found["tokens"], found["seconds_left"]) == (3, 10, 300, 14.0)
    assert found["loss_parts"] == {"loss": 2.0, "clm": 1.5, "divergence": 0.5}
    assert found["heldout"] == {"step": 0, "tokens_trained": 0, "cross_entropy": 6.0, "kl": 2.0, "full_ece": None}
    assert found["checkpoint"]["step"] == 4
    assert 0 <= found["checkpoint"]["age_seconds"] < 60
    assert found["disk_bytes"] == on_disk
    assert "\n".join(standing.lines(found)).splitlines()[:4] == [
        f"watched ({run.folder}): running",
        "  step 3 of 10, 300 tokens, 14 s left",
        "  loss 2.0000  clm 1.5000  divergence 0.5000  lr 1.00e-03  grad 0.800",
        "  12,346 tok/s, 50 % of peak, 2.0 GB of memory, 0 updates skipped",
    ]
    assert "  held out at step 0: cross_entropy 6.0000  kl 2.0000" in standing.lines(found)


def test_runs_that_no_process_trains(tmp_path: Path) -> None:
    run = place(tmp_path)
    shutil.rmtree(run.folder / "checkpoints")
    found = standing.status(run)
    assert (found["state"], found["step"], found["checkpoint"], found["seconds_left"]) == ("killed", 0, None, None)
    assert "ended without a word" in next(standing.lines(found))
    (run.folder / "lock.json").write_text("{}")  # of a process that died
    assert standing.status(run)["state"] == "killed"
    (run.folder / "exit.json").write_text('{"format": 1, "exit_code": 75, "message": "asked to stop", "step": 3}')
    assert "stopped with code 75: asked to stop" in next(standing.lines(standing.status(run)))
    (run.folder / "evaluation.json").write_text("{}")
    assert standing.status(run)["state"] == "finished"


def test_a_run_whose_corpus_is_prepared(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with folder.locked(run):
        assert list(standing.lines(standing.status(run))) == [f"run ({run.folder}): preparing"]


def test_a_lock_that_is_looked_at_is_not_in_use(tmp_path: Path) -> None:
    """A run that starts at the very moment in which `tailkd status` looks."""
    import fcntl
    import threading

    run = place(tmp_path)
    with (run.folder / "lock.json").open("w") as looked:
        fcntl.flock(looked, fcntl.LOCK_SH)
        threading.Timer(folder.LOOKED_AT / 2, fcntl.flock, (looked, fcntl.LOCK_UN)).start()
        with folder.locked(run):
            pass


@hypothesis.given(
    st.lists(st.text("ab", min_size=1, max_size=9), max_size=8), st.text("ab", max_size=5), st.integers(1, 12)
)
def test_lines_from_the_end(tmp_path_factory: pytest.TempPathFactory, lines: list[str], torn: str, block: int) -> None:
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_text("".join(f"{line}\n" for line in lines) + torn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standing, "BLOCK", block)
        assert [line.decode() for line in standing._from_the_end(path)] == lines[::-1]


def test_no_more_is_read_than_must_be(tmp_path: Path) -> None:
    run = place(tmp_path, EVALUATION, *(step(n) for n in range(1, 101)), {**EVALUATION, "step": 100})
    (run.folder / "metrics.jsonl").write_bytes(b"no record\n" + (run.folder / "metrics.jsonl").read_bytes())
    recent, evaluation = standing.last_records(run.folder / "metrics.jsonl")
    assert ([one["step"] for one in recent], evaluation["step"]) == (list(range(51, 101)), 100)


def test_the_verb(tmp_path: Path) -> None:
    run = place(tmp_path, EVALUATION, step(1))
    for code, arguments in ((0, [run.folder, "--json"]), (0, [run.folder, run.folder]), (2, [run.folder, tmp_path])):
        result = CliRunner().invoke(cli.app, ["status", *map(str, arguments)])
        assert (0 if result.exception is None else result.exception.exit_code) == code
        if code == 0 and "--json" in arguments:
            assert json.loads(result.stdout)[0]["step"] == 1
        elif code == 0:
            assert result.stdout.count("step 1 of 10") == 2
        else:
            assert "is not a run folder: it holds no recipe.yaml" in str(result.exception)
    (run.folder / "metrics.jsonl").write_text('{"kind": "header", "format": 9}\n')
    with pytest.raises(Refusal, match=r"has format 9; this tailkd reads format 1"):
        standing.status(run)


# ----- docs/watching.md


def test_the_documents_examples_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    builders.write_corpus(tmp_path / "corpus.jsonl")
    for name in ("teacher", "student"):
        shutil.copytree(stranger.folder / name, tmp_path / name)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    if not all(importlib.util.find_spec(name) for name in ("tensorboard", "wandb", "trackio")):
        text = text[: text.index("track:")]
    (tmp_path / "recipe.yaml").write_text(text)
    run = tailkd.distill("recipe.yaml")
    record = [one for one in run.metrics if one["kind"] == "step"][-1]
    assert 0 < record["utilisation"] < 10
    assert record["memory_bytes"] > 50_000_000
    assert run.environment["matrix_products"]["dtype"] == "float32"
    (commands,) = re.findall(r"```\n(tailkd status .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for command in commands.splitlines():
        result = CliRunner().invoke(cli.app, command.split()[1:])
        assert result.exit_code == 0
        assert "finished" in result.stdout
    if "track:" in text:
        assert (run.folder / "tensorboard").is_dir()
        assert (run.folder / "wandb").is_dir()
        assert (tmp_path / "trackio" / "distillation.db").is_file()
