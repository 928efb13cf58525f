"""`tailkd evaluate --tasks`: what is asked of which model, and where the results go."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import suites
import torch
from typer.testing import CliRunner

from tailkd import cli, examination, folder
from tailkd.errors import OutOfMemory, Refusal
from tailkd.evaluate import commonsense, mathematics
from tailkd.report.record import FORMAT, Run


def evaluate(*arguments: str | Path) -> tuple[str, str]:
    """Standard output and error."""
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


class Fakes:
    """In place of lm-eval and of a model that solves: results without either, and what they were asked."""

    def __init__(self) -> None:
        self.commonsense: list[dict[str, Any]] = []
        self.mathematics: list[dict[str, Any]] = []
        self.told: list[str] = []
        self.value, self.failing = 0.5, ""

    def harness(self, model: Any, tokenizer: Any, batch_size: int) -> Any:
        def ask(task: Any, local: Any, *, shots: int, limit: int | None) -> Any:
            if task.name == self.failing:
                raise OutOfMemory("too much")
            self.commonsense.append({"task": task.name, "dtype": model.dtype, "batch_size": batch_size})
            sample = {"prompt": f"{shots}", "continuations": [task.name], "score": 1}
            return SimpleNamespace(value=self.value, error=0.1, samples=[sample] * (limit or 3), cut=0)

        return SimpleNamespace(ask=ask)

    def measured(self, model: Any, tokenizer: Any, tasks: Any, **options: Any) -> list[dict[str, Any]]:
        self.mathematics.append({"tasks": tuple(tasks), **options})
        entry = {"suite": "mathematics", "shots": 8, "metric": "exact", "value": 0.25, "error": 0.1, "items": 4}
        return [{**entry, "task": task, "limit": options["limit"], "items_hash": task, "scores": []} for task in tasks]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    harness = SimpleNamespace(Harness=made.harness)
    monkeypatch.setitem(sys.modules, "tailkd.evaluate.commonsense.harness", harness)
    monkeypatch.setattr(commonsense, "can_measure", lambda: True)
    solving = SimpleNamespace(measured=made.measured)
    monkeypatch.setitem(sys.modules, "tailkd.evaluate.mathematics.solving", solving)
    monkeypatch.setattr(mathematics, "solving", solving, raising=False)
    for name in ("write_page", "write_card"):
        monkeypatch.setattr(examination, name, lambda *_, name=name: made.told.append(name))
    return made


@pytest.fixture
def model(stranger: SimpleNamespace) -> str:
    return str(stranger.student)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return suites.write(tmp_path / "data" / "commonsense", without=("storycloze_2018",)).parent


def run_folder(place: Path, student: str, **training: Any) -> Run:
    """What of a finished run is read: its recipe, its student, that it has an evaluation."""
    from tailkd import recipe_file

    recipe = {
        "name": "run",
        "out": str(place),
        "teacher": {"model": student},
        "student": {"model": student},
        "data": {"train": {"path": "corpus.jsonl"}, "context": 24},
        "objective": {"divergence": "forward_kl"},
        "training": {"tokens": 1_000, "batch_size": 8, "learning_rate": 1e-3, **training},
    }
    place.mkdir(parents=True)
    recipe_file.write(recipe_file.read(recipe, files=False), place / "recipe.yaml")
    shutil.copytree(student, place / "student")
    (place / "evaluation.json").write_text(json.dumps({"format": FORMAT}))
    return Run(place)


# ----- results


def test_a_suite_of_a_bare_model(
    fakes: Fakes, model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, told = evaluate(model, "--tasks", "commonsense", "--shots", "0,5", "--limit", 4, "--data", data)
    assert "storycloze_2018 is left out: it is no free download" in told
    found = Run(Path("evaluations/student")).tasks
    assert [(one["task"], one["shots"]) for one in found] == [
        (task, shots) for task in commonsense.TASKS if task != "storycloze_2018" for shots in (0, 5)
    ]
    assert {one["model"] for one in found} == {model}
    assert {one["precision"] for one in found} == {"float32"}
    assert all(len(one["scores"]) == one["items"] == 4 for one in found)
    for one in found:
        lines = (Path("evaluations/student") / one["samples"]).read_text().splitlines()
        assert [json.loads(line)["score"] for line in lines] == one["scores"]
    assert out.count("50.00 ± 10.00") == 14
    assert "average, commonsense, 5 shots: over 7 tasks, without storycloze_2018, the first 4 items of each" in out
    assert "results: evaluations/student/tasks.json" in out
    assert {one["batch_size"] for one in fakes.commonsense} == {8}


def test_the_command_in_a_result_measures_it_again(fakes: Fakes, model: str, data: Path, tmp_path: Path) -> None:
    options = ["--tasks", "piqa,winogrande", "--shots", "5", "--limit", 3, "--precision", "bfloat16"]
    evaluate(model, *options, "--data", data, "--out", tmp_path / "out", "--batch-size", 2)
    before = Run(tmp_path / "out").tasks
    assert fakes.commonsense[0] == {"task": "winogrande", "dtype": torch.bfloat16, "batch_size": 2}
    program, verb, *words = shlex.split(before[0]["command"])
    assert (program, verb) == ("tailkd", "evaluate")
    evaluate(*words, "--out", tmp_path / "again")
    assert Run(tmp_path / "again").tasks == before


def test_a_run_keeps_the_results_of_its_student(fakes: Fakes, model: str, data: Path, tmp_path: Path) -> None:
    """In the run's precision; measured again, a result is replaced."""
    run = run_folder(tmp_path / "run", model, precision="bfloat16")
    evaluate(run.folder, "--tasks", "piqa,arc_easy", "--data", data)
    fakes.value = 0.75
    evaluate(run.folder, "--tasks", "piqa", "--data", data)
    found = Run(run.folder).tasks
    assert {(one["task"], one["value"], one["model"]) for one in found} == {
        ("arc_easy", 0.5, "student"),
        ("piqa", 0.75, "student"),
    }
    assert fakes.commonsense[0]["dtype"] == torch.bfloat16
    assert fakes.told == ["write_page", "write_card"] * 2
    assert shlex.split(found[0]["command"])[2] == str(run.folder)
    assert json.loads((run.folder / "tasks.json").read_text())["format"] == FORMAT


def test_what_is_measured_stays_when_a_later_task_fails(fakes: Fakes, model: str, data: Path, tmp_path: Path) -> None:
    fakes.failing = "piqa"
    with pytest.raises(OutOfMemory):
        evaluate(model, "--tasks", "arc_easy,piqa", "--data", data, "--out", tmp_path / "out")
    assert [one["task"] for one in Run(tmp_path / "out").tasks] == ["arc_easy"]


def test_both_suites_with_one_model(
    fakes: Fakes, model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = examination.load.load_model
    monkeypatch.setattr(
        examination.load, "load_model", lambda *names, **options: loaded.append(names) or load(*names, **options)
    )
    (data / "math").mkdir()
    options = ["--data", data, "--out", tmp_path / "out", "--limit", 4, "--json"]
    printed = json.loads(evaluate(model, "--tasks", "mathematics,commonsense", *options)[0])
    assert len(loaded) == 1
    (asked,) = fakes.mathematics
    assert asked["tasks"] == tuple(mathematics.TASKS)
    assert {key: asked[key] for key in ("data", "prompts", "out", "limit", "batch_size")} == {
        "data": data / "math",
        "prompts": None,
        "out": tmp_path / "out",
        "limit": 4,
        "batch_size": 8,
    }
    assert asked["command"].startswith("tailkd evaluate ")
    assert printed["results"] == Run(tmp_path / "out").tasks
    assert [one["task"] for one in printed["results"]][7:] == list(mathematics.TASKS)
    assert {one["suite"]: one["value"] for one in printed["averages"]} == {"commonsense": 0.5, "mathematics": 0.25}
    evaluate(model, "--tasks", "gsm8k", "--data", tmp_path, "--out", tmp_path / "out")  # the folder of the files itself
    assert fakes.mathematics[1]["data"] == tmp_path


def test_against_a_baseline(fakes: Fakes, model: str, data: Path, tmp_path: Path) -> None:
    options = ["--tasks", "piqa,arc_easy", "--data", data, "--out"]
    evaluate(model, *options, tmp_path / "base")
    fakes.value = 0.25
    for base, expected in (("10", "-30.10"), ("e", "-69.31")):
        out, _ = evaluate(model, *options, tmp_path / "out", "--baseline", tmp_path / "base", "--base", base)
        assert out.count(expected) == 3


def test_a_gguf_file(fakes: Fakes, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """By its path, or by its folder and name; which files can be read is a matter of models/load.py."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    found = [
        examination.subject("models/tiny.gguf"),
        examination.subject("models", gguf_file="tiny.gguf"),
        examination.subject("some/models", gguf_file="tiny.gguf"),
    ]
    assert [(one.model, one.gguf_file) for one in found] == [
        ("models", "tiny.gguf"),
        ("models", "tiny.gguf"),
        ("some/models", "tiny.gguf"),
    ]
    assert {one.folder for one in found} == {Path("evaluations/tiny")}
    asked = examination.Asked("piqa")
    commands = [examination.command(one, asked).split(" --tasks")[0] for one in found]
    assert commands == [
        "tailkd evaluate models/tiny.gguf",
        "tailkd evaluate models --gguf-file tiny.gguf",
        "tailkd evaluate some/models --gguf-file tiny.gguf",
    ]
    assert examination.subject("org/name").folder == Path("evaluations/name")


# ----- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "piqua"], "--tasks 'piqua': expected commonsense, mathematics, or of hellaswag"),
        (["--tasks", ","], "--tasks ',': expected"),
        (["--tasks", "piqa", "--shots", "0,-5"], "--shots '0,-5': expected numbers from 0 on"),
        (["--tasks", "gsm8k"], "mathematics reads local files"),
        (["--tasks", "storycloze_2018"], "storycloze_2018 is no free download: ask its makers"),
        (["--tasks", "storycloze_2018", "--data", "."], "storycloze_2018 is no free download: ask its makers"),
        (["--tasks", "piqa", "--baseline", "nowhere"], "nowhere has no results of tasks"),
        (["--limit", "4"], "go with --tasks; name the tasks"),
    ],
)
def test_what_cannot_be_asked(
    options: list[str], message: str, fakes: Fakes, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        evaluate(model, *options)
    assert message in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_without_the_extra_its_installation_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Refusal, match=r"not installed: pip install 'tailkd\[eval\]'"):
        evaluate(model, "--tasks", "piqa")


def test_a_run_is_measured_where_it_is_and_finished(model: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", model)
    with pytest.raises(Refusal, match="is a run: its student is measured, and its results stay in it"):
        evaluate(run.folder, "--tasks", "piqa", "--out", tmp_path / "out")
    (run.folder / "evaluation.json").unlink()
    with pytest.raises(Refusal, match="is not finished; finish it first"):
        evaluate(run.folder, "--tasks", "piqa")


def test_results_of_two_models_do_not_mix(fakes: Fakes, model: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    evaluate(model, "--tasks", "piqa", "--data", data, "--out", tmp_path / "out")
    with pytest.raises(Refusal, match=r"holds results of .*, not of .*; give another --out"):
        evaluate(tmp_path / "other", "--tasks", "piqa", "--data", data, "--out", tmp_path / "out")


def test_a_model_without_a_tokenizer(fakes: Fakes, data: Path, tmp_path: Path) -> None:
    bare = builders.save_model(tmp_path / "bare", None, vocabulary=300)
    with pytest.raises(Refusal, match="bare holds no tokenizer; save the model's into it"):
        evaluate(bare, "--tasks", "piqa", "--data", data, "--out", tmp_path / "out")


def test_a_run_that_starts_anew_drops_the_results_of_its_old_student(tmp_path: Path, model: str) -> None:
    run = run_folder(tmp_path / "run", model)
    (run.folder / "tasks.json").write_text(json.dumps({"format": FORMAT, "results": []}))
    (run.folder / "tasks" / "commonsense").mkdir(parents=True)
    folder.clear(run)
    assert not list(run.folder.iterdir())


# ----- docs/evaluation.md


def test_the_commands_of_the_documentation(
    fakes: Fakes, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("tailkd evaluate ")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examination.load, "load_tokenizer", lambda *names, **options: "tokenizer")
    monkeypatch.setattr(examination.load, "load_model", lambda *names, **options: SimpleNamespace(dtype=None))
    for name in ("tad", "kl"):
        run_folder(tmp_path / "runs" / name, model)
    shutil.copytree(model, tmp_path / "models" / "teacher")
    (tmp_path / "models" / "smollm2.gguf").write_bytes(b"GGUF")
    suites.write(tmp_path / "sets")
    for _, _, *words in commands:
        out, _ = evaluate(*words)
    assert len(commands) == 5
    assert len(Run(Path("runs/tad")).tasks) == 16 + 8 + 8
    assert len(Run(Path("evaluations/teacher")).tasks) == 2
    assert out.endswith("results: evaluations/smollm2/tasks.json\n")
    table = re.findall(r"^\| (\w+) \| (acc\w*) \| .* \| `(\S+)` \|", text, re.MULTILINE)
    assert {name: (metric, Path(file).stem) for name, metric, file in table} == {
        task.name: (task.metric, task.files[0]) for task in commonsense.TASKS.values()
    }
