"""F42, F44 and the crash report: nothing secret is written, and a writer that fails stops no training."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd import cli
from tailkd.errors import Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.report.record import Metrics, Run
from tailkd.report.terminal import Terminal
from tailkd.secrets import masked, without_secrets

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
        patch.setattr(SplitModel, "__call__", running.on_call(32, fails))
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
    written = written_in(folder) + said
    assert not [canary for canary in CANARIES if canary in written]
    assert tailkd.distill(recipe).finished
    assert not (folder / "crash.json").exists()


def written_in(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def with_secrets(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose name, models and corpus carry what looks like a token, and which works all the same."""
    hidden = tmp_path / f"{CANARIES[1]}" / f"x?token={CANARIES[3]}"
    hidden.mkdir(parents=True)
    shutil.copytree(stranger.teacher, hidden / "teacher")
    shutil.copytree(stranger.student, hidden / "student")
    shutil.copy(stranger.corpus, hidden / "corpus.jsonl")
    with (hidden / "corpus.jsonl").open("a") as file:  # a record that is named where it lies
        file.write('{"body": 5}\n')
    recipe["name"] = f"student of https://user:{CANARIES[2]}@example.org/model"
    recipe["teacher"]["model"], recipe["student"]["model"] = str(hidden / "teacher"), str(hidden / "student")
    recipe["data"] |= {"train": {"path": str(hidden / "corpus.jsonl"), "text": "body"}, "max_bad": 0.1}
    return recipe


def test_f42_secrets_in_a_recipe(
    with_secrets: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, resumed and finished: masked in every file and message, and the same run all the same."""
    folder = Path(with_secrets["out"])
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(35, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(with_secrets)
    for _ in ("resumed", "finished already"):
        assert tailkd.distill(with_secrets).finished
    with pytest.raises(Refusal, match=r"training.seed: was 3, is 4"):
        tailkd.distill(with_secrets, **{"training.seed": 4})
    with pytest.raises(Refusal, match=r"data.train.text: was 'body', is 'https://\*\*\*@example.org'"):
        tailkd.distill(with_secrets, **{"data.train.text": f"https://user:{CANARIES[2]}@example.org"})
    said = capfd.readouterr().err
    assert "going on from step" in said
    assert "already finished" in said
    recipe = Run(folder).recipe
    assert recipe["name"] == "student of https://***@example.org/model"
    assert recipe["teacher"]["model"].endswith("/***/x?token=***")
    names = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "environment.json", "README.md", "report.html", "checkpoints", "data.json"} <= names
    written = written_in(folder) + said
    assert not [canary for canary in CANARIES if canary in written]


@pytest.mark.parametrize("key", ["student.model", "data.train.path", "objective.divergence", "training.seeed"])
def test_f42_secrets_in_a_recipe_that_is_refused(recipe: dict[str, Any], key: str) -> None:
    value = f"https://user:{CANARIES[2]}@example.org/{CANARIES[1]}"
    with pytest.raises(Refusal) as refused:
        tailkd.distill(recipe, **{key: value})
    assert not [canary for canary in CANARIES if canary in str(refused.value)]


def test_f42_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and variables that only sound like it stay as they are: a masked path cannot be opened again."""
    monkeypatch.setenv("TOKENIZER", "/models/tokenizer")
    monkeypatch.setenv("MAX_TOKENS", "2000000")
    assert without_secrets("https://canary@example.org/x") == "https://***@example.org/x"
    text = "/data/hf_transformers2/sk_experiments_of_summer/monkey/models/tokenizer 2000000 tokens"
    assert without_secrets(text) == text
    assert masked({"a": [1, ("hf_" + "aB3" * 12, None)]}) == {"a": [1, ["***", None]]}


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
