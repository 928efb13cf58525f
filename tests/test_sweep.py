"""Many runs of one recipe: which ones, what they cost, and that the same command goes on where it was stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running
import torch
from typer.testing import CliRunner

from tailkd import cli, recipe_file, sweep
from tailkd.bill import bill
from tailkd.errors import DIVERGED, PREEMPTED, Preempted, Refusal
from tailkd.models.head import SplitModel


@pytest.fixture
def recipe(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    return {**running.small(stranger, tmp_path / "unused"), "name": "pair"}


@pytest.fixture
def recipe_path(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a verb."""
    monkeypatch.setattr("sys.argv", ["tailkd", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_every_combination_has_a_name_a_folder_and_its_values(recipe: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["objective.top_k=1,5", "objective.beta=1.5", "training.betas=[0.9,0.95],[0.9, 0.99]"]
    planned = sweep.plan(recipe, arguments, tmp_path)
    assert [one.name for one in planned] == [
        "pair-top_k=1-betas=0.9_0.95",
        "pair-top_k=1-betas=0.9_0.99",
        "pair-top_k=5-betas=0.9_0.95",
        "pair-top_k=5-betas=0.9_0.99",
    ]
    assert [one.folder for one in planned] == [tmp_path / one.name for one in planned]
    assert [one.objective.top_k for one in planned] == [1, 1, 5, 5]
    assert [one.training.betas for one in planned] == [(0.9, 0.95), (0.9, 0.99)] * 2
    assert {one.objective.beta for one in planned} == {1.5}


def test_keys_with_one_last_part_are_named_whole(recipe: dict[str, Any], stranger: SimpleNamespace) -> None:
    models = f"{stranger.teacher},{stranger.student}"
    names = [one.name for one in sweep.plan(recipe, [f"teacher.model={models}", f"student.model={models}"])]
    assert len(set(names)) == 4
    assert all("teacher.model=" in name and "-student.model=" in name and "/" not in name for name in names)


def test_one_run_where_nothing_is_swept(recipe: dict[str, Any]) -> None:
    (alone,) = sweep.plan(recipe, ["name=other", "training.betas=[0.8,0.9]"])
    assert alone.folder == Path("runs/other-sweep/other")
    assert alone.training.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.seed=1,2", "training.seed=3"], "training.seed is given twice"),
        (["out=a,b"], "a sweep names its runs and their folders itself; take --out DIR"),
        (["name=a,b"], "name=a,b: a sweep names its runs"),
        (["training.betas=[0.9,0.95"], r"training.betas=\[0.9,0.95: not values between commas; expected"),
        (["training.seed=1,2,1"], "runs would be named pair-seed=1: expected names that differ"),
        ([f"data.train.text={'x' * 201},body"], "of at most 200 bytes"),
        (["training.seed=1,-2,-3"], "2 problems in the recipe, nothing was started\n.*came -2\n.*came -3"),
        (["objective.top_k=1,2", "training.seeds=1,2"], "1 problem in the recipe.*\n.*training.seeds: unknown key"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_the_first_run(
    arguments: list[str], message: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=message):
        sweep.plan(recipe, arguments, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_an_interrupted_sweep_goes_on_by_the_same_command(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    arguments = ("sweep", recipe_path, "training.seed=1,2", "training.tokens=1152", "--out", out)
    forward, second = SplitModel.__call__, out / "pair-seed=2"

    def stopped(split: SplitModel, *inputs: torch.Tensor) -> Any:
        if len(running.records(second)) == 5:
            running.send(signal.SIGTERM)()
        return forward(split, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", stopped)
        assert command(monkeypatch, *arguments) == PREEMPTED
    assert "SIGTERM came" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["pair-seed=1", "pair-seed=2"]
    finished = out / "pair-seed=1" / "evaluation.json"
    before = finished.stat().st_mtime_ns
    assert command(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    assert "1 of 2: pair-seed=1: finished already" in captured.err
    assert "going on from step 5" in captured.err
    assert finished.stat().st_mtime_ns == before
    assert all(name in captured.out for name in ("pair (2 seeds)", "report.html"))
    assert "pair (2 seeds)" in (out / "report.html").read_text()
    with pytest.raises(Refusal, match=r"holds the run of another recipe:\n  training.tokens: was 1152, is 1920"):
        sweep.plan(recipe_path, ["training.seed=1,2,3", "training.tokens=1920"], out)


def test_one_that_diverges_is_noted_and_the_others_go_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    arguments = ["training.learning_rate=1e30,1e-3", "training.tokens=1152"]
    runs, page = sweep.train(sweep.plan(recipe, arguments, tmp_path), said.append)
    assert [run.finished for run in runs] == [False, True]
    assert any("diverged at step" in line for line in said)
    assert json.loads((runs[0].folder / "exit.json").read_text())["exit_code"] == DIVERGED
    assert page.parent == tmp_path
    assert "pair-learning_rate=1e+30 diverged at step" in page.read_text()


def test_the_time_limit_is_that_of_the_whole_sweep(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []
    clock = iter([0.0, 10.0, 50.0, 99.5])
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sweep, "distill", lambda one: limits.append(one.training.stop_after_seconds))
    planned = sweep.plan(recipe, ["training.seed=1,2,3", "training.stop_after=100s"], tmp_path)
    with pytest.raises(Preempted, match=r"training.stop_after is over"):
        sweep.train(planned, lambda line: None)
    assert limits == [90.0, 50.0]


def test_torchrun_is_refused(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="a sweep trains in one process"):
        sweep.train(sweep.plan(recipe, [], tmp_path), lambda line: None)


def test_a_dry_run_prints_the_bill_and_writes_nothing(
    recipe_path: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    priced = ["hardware.peak_flops=1e9", "hardware.price_per_hour=2"]
    arguments = ["sweep", str(recipe_path), "training.tokens=1920,3840", *priced, "--dry-run"]
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert sorted(tmp_path.rglob("*")) == before
    rows = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines() if line.strip()}
    overrides = {"hardware.peak_flops": 1e9, "hardware.price_per_hour": 2, "training.tokens": 1920}
    found = bill(recipe_file.read(recipe, overrides))
    assert found.hours is not None
    tokens, operations, memory, hours, money = rows["pair-tokens=1920"]
    assert (tokens, operations) == ("1,920", f"{found.executed.total * 1920 / 1e6:,.3g}")
    assert (memory, hours, money) == (f"{found.memory.total / 1e9:.2f}", f"{found.hours:.3g}", f"{found.money:.3g}")
    assert rows["all"][:2] == ["2", "5,760"]
    assert float(rows["all"][4]) == pytest.approx(3 * found.hours, rel=5e-3)
    without = CliRunner().invoke(cli.app, ["sweep", str(recipe_path), "--dry-run"], env={"COLUMNS": "120"}).output
    assert "hours need hardware.peak_flops" in without
