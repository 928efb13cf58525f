"""F42, F44 and the crash report: nothing secret is written, and a writer that fails stops no training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import running

import tailkd
from tailkd import cli
from tailkd.models.head import SplitModel
from tailkd.report.record import Metrics
from tailkd.report.terminal import Terminal

CANARIES = ("canary-in-environment-1", "hf_canaryInException2", "canary-in-url-3", "canary-in-query-4")


def test_f42_a_crash_says_what_and_where_and_no_secret(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES[0])

    def fails() -> None:
        url = f"https://user:{CANARIES[2]}@example.org/x?token={CANARIES[3]}"
        raise OSError(f"no answer from {url} with {CANARIES[0]} and {CANARIES[1]}")

    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["tailkd", "distill", str(file)])
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(37, fails))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    folder, said = Path(recipe["out"]), capfd.readouterr().err
    lines = said[said.index("tailkd: stopped") :].splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("tailkd: stopped after step 3 by OSError: no answer from https://***@example.org")
    assert "saved: step-000000003" in lines[2]
    crash = json.loads((folder / "crash.json").read_text())
    assert crash["last_step"] == 3
    assert "torch" in crash["environment"]["versions"]
    assert any("accumulate_gradients" in line for line in crash["where"])
    assert json.loads((folder / "exit.json").read_text())["exit_code"] == 1
    written = "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()) + said
    assert not [canary for canary in CANARIES if canary in written]
    assert tailkd.distill(recipe).finished
    assert not (folder / "crash.json").exists()


def test_f44_records_wait_for_room(tmp_path: Path) -> None:
    """In a process that may write 400 bytes to a file: records beyond wait, and no line is torn."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom tailkd.report.record import Metrics\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "metrics = Metrics(Path(sys.argv[1]))\nhard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))\n"
        "for step in range(40):\n    metrics.append({'kind': 'step', 'step': step})\n"
        "print(metrics.size())\nresource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "metrics.append({'kind': 'step', 'step': 40})\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert 300 < int(done.stdout) <= 400
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records[1:]] == list(range(41))


def test_f44_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "step", "step": 1})
    size = metrics.size()
    metrics.append({"kind": "step", "step": 2})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    Metrics(tmp_path / "metrics.jsonl", resume_at=size).append({"kind": "step", "step": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 1, 2]


def test_f44_a_terminal_that_is_gone(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("rich.console.Console.print", gone)
    Terminal(steps=1, name="x").say("hello")
    assert tailkd.distill(recipe).finished
