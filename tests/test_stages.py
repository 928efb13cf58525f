"""A second stage: the student of a finished run goes on in another run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tailkd
from tailkd import cli, pair, recipe_file
from tailkd import run as run_module
from tailkd.errors import Refusal, Stop
from tailkd.report.record import Run


@pytest.fixture
def first(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    return running.small(stranger, tmp_path / "stage1", tokens=4 * 8 * 24)


@pytest.fixture
def second(first: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    return {
        **running.small(stranger, tmp_path / "stage2", tokens=6 * 8 * 24, save_every_tokens=2 * 8 * 24),
        "student": {"run": first["out"]},
    }


def interrupted(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run at its second evaluation, after checkpoints were written."""
    real, calls = run_module._evaluation_record, 0

    def record(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop("as asked")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_evaluation_record", record)
        with pytest.raises(Stop):
            tailkd.distill(recipe)
    assert list((Path(recipe["out"]) / "checkpoints").glob("step-*"))


def test_it_goes_on_where_the_first_ended(first: dict[str, Any], second: dict[str, Any]) -> None:
    one = tailkd.distill(first)
    two = tailkd.distill(second)
    assert two.evaluation["student_before"] == one.evaluation["student"]
    assert two.evaluation["student"]["kl"] < one.evaluation["student"]["kl"]
    assert f"started from the student of the run `{first['out']}`" in (two.folder / "README.md").read_text()
    assert tailkd.distill(second).evaluation == two.evaluation  # already finished


def test_an_unfinished_run_is_refused_and_the_command_that_ends_it_works(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=r"student\.run: .*stage1 is not a run folder: it holds no recipe\.yaml"):
        tailkd.distill(second)
    one = tailkd.distill(first)
    for name in ("evaluation.json", "student/model.safetensors", "student/config.json"):
        (one.folder / name).unlink()
    with pytest.raises(Refusal, match="is not finished; finish it first: tailkd distill ") as caught:
        tailkd.distill(second)
    assert not Path(second["out"]).exists()
    command = str(caught.value).split("finish it first: tailkd ")[1].split()
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert tailkd.distill(second).finished


def test_without_files_too(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The ledger looks at no files beforehand; it needs the student's configuration."""
    with pytest.raises(Refusal, match=r"student\.run: .*stage1 is not a run folder"):
        pair.configurations(recipe_file.read(second, files=False))


def test_a_changed_first_stage_is_noticed(
    first: dict[str, Any], second: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tailkd.distill(first)
    interrupted(second, monkeypatch)
    weights = one.student / "model.safetensors"
    before = load_file(weights)
    changed = {name: tensor.clone() for name, tensor in before.items()}
    next(iter(changed.values())).view(torch.int32).view(-1)[0] ^= 1
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"student\.run \(content\): was '.*', is '"):
        tailkd.distill(second)
    save_file(before, weights, metadata={"format": "pt"})
    going_on = tailkd.distill(second)
    straight = tailkd.distill({**second, "out": second["out"] + "-straight"})
    assert running.steps(going_on) == running.steps(straight)


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ({"model": "a", "run": "b"}, "student: expected one of model, from_teacher or run; came model, run"),
        ({"run": "OUT"}, r"student\.run: '.*' is this run's own folder; give the run of the stage before"),
    ],
)
def test_what_does_not_go(second: dict[str, Any], student: dict[str, str], told: str) -> None:
    student = {key: value.replace("OUT", second["out"]) for key, value in student.items()}
    with pytest.raises(Refusal, match=told):
        recipe_file.read({**second, "student": student})


def test_a_recipe_that_extends_the_first_stages(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    """Its run takes the place of the model."""
    (tmp_path / "one.yaml").write_text(json.dumps(first))
    (tmp_path / "two.yaml").write_text(f"extends: one.yaml\nout: {second['out']}\nstudent: {{run: {first['out']}}}\n")
    found = recipe_file.read(tmp_path / "two.yaml", files=False)
    assert (found.student.model, found.student.run) == (None, first["out"])
    assert Run(tmp_path / "stage1").finished is False
