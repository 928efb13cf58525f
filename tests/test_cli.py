"""The verbs, in process; what a user types and sees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tailkd import cli
from tailkd.cli import planning, training
from tailkd.errors import Refusal
from tailkd.models.shrink import Cut, cut_student


def tailkd(*arguments: str, expected: int = 0) -> tuple[str, str]:
    """Standard output and error of a verb that ends with the expected exit code."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == expected, result.output
    return result.stdout, result.stderr


@pytest.fixture
def recipe_path(recipe: dict[str, Any], tmp_path: Path) -> Path:
    recipe["training"] |= {"tokens": 2_000, "save_every_tokens": None}
    recipe["evaluate"] = {"tokens": 1_000}
    path = tmp_path / "recipe.yaml"
    YAML().dump(recipe, path)
    return path


def test_the_verbs_are_these() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert names == {
        "demo",
        "distill",
        "status",
        "sweep",
        "generate",
        "prepare",
        "shrink",
        "evaluate",
        "export",
        "measure",
        "report",
        "compare",
        "check",
        "ledger",
        "recipes",
        "init",
        "schema",
        "doctor",
        "score",
        "cache",
    }


def test_distill_evaluate_report(recipe_path: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "elsewhere")
    table, _ = tailkd("distill", str(recipe_path), f"out={out}", "training.seed=4")
    assert "student before" in table.replace("\n", " ")
    assert YAML(typ="safe").load(Path(out) / "recipe.yaml")["training"]["seed"] == 4
    evaluated = json.loads(tailkd("evaluate", out, "--json")[0])
    reported = json.loads(tailkd("report", out, "--json")[0])
    assert evaluated == reported
    assert reported[0]["evaluation"]["student"]["kl"] > 0
    page = tmp_path / "page.html"
    tailkd("report", out, out, "--out", str(page))
    assert page.read_text().count('<th scope="row">') == 2 + 2 + 1 + 2


def test_distill_again_says_that_it_is_finished(recipe_path: Path) -> None:
    tailkd("distill", str(recipe_path))
    assert "already finished" in tailkd("distill", str(recipe_path))[1]


def test_check(recipe_path: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    found = json.loads(tailkd("check", str(recipe_path), "--json")[0])
    assert found["vocabulary"]["usable_ids"] == 400
    assert found["steps"] == 6
    assert found["corpus"]["exact"]
    assert found["corpus"]["tokens"] == found["corpus"]["sampled_tokens"] > 10_000
    assert "⏐" in found["corpus"]["rows"][0] + found["corpus"]["rows"][1]
    assert found["memory_bytes"]["total"] > found["memory_bytes"]["weights"] > 0
    assert re.search(r"steps +6", tailkd("check", str(recipe_path))[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_check_lists_everything_at_once(recipe_path: Path, stranger: SimpleNamespace, tmp_path: Path) -> None:
    """A bad key, a missing file and another vocabulary."""
    corpus = [json.loads(line)["body"] for line in stranger.corpus.open()]
    other = builders.save_model(tmp_path / "other", builders.build_tokenizer(corpus[::2]), hidden=32, seed=2)
    overrides = ("training.learning_rat=1", "data.train.path=nowhere.jsonl", f"student.model={other}")
    with pytest.raises(Refusal) as refused:
        planning.check(recipe_path, list(overrides))
    message = str(refused.value)
    assert "3 problems" in message
    assert "training.learning_rat: unknown key; did you mean 'learning_rate'" in message
    assert "data.train.path: no file, folder or match at 'nowhere.jsonl'" in message
    assert "vocabulary: teacher and student do not share one vocabulary" in message


def test_the_ledger_needs_configurations_alone(recipe_path: Path, stranger: SimpleNamespace) -> None:
    overrides = [f"teacher.config={stranger.teacher / 'config.json'}", "data.train.path=nowhere.jsonl"]
    hardware = ["hardware.peak_flops=1e12", "hardware.price_per_hour=2.5"]
    found = json.loads(tailkd("ledger", str(recipe_path), *overrides, *hardware, "--json")[0])
    assert found["parameters"]["student"]["total"] < found["parameters"]["teacher"]["total"]
    spent = found["executed"]["total"] * 1e15 * 2_000 / 1e6
    assert found["hours"] == pytest.approx(spent / 0.4e12 / 3600)
    assert found["money"] == pytest.approx(2.5 * found["hours"])
    assert "pflop per million tokens" in tailkd("ledger", str(recipe_path))[0]


def test_shrink_writes_what_a_run_starts_from(recipe_path: Path, stranger: SimpleNamespace, tmp_path: Path) -> None:
    cut = ["student.model=null", "student.from_teacher.layers=1", "student.from_teacher.freeze_embeddings=true"]
    out = tmp_path / "new" / "student"
    said = tailkd("shrink", str(recipe_path), "--out", str(out), *cut, "data.train.path=nowhere.jsonl")[0]
    student = AutoModelForCausalLM.from_pretrained(out)
    total, embedding = student.num_parameters(), student.get_input_embeddings().weight.numel()
    assert f"{total:,} parameters, {embedding:,} of them embeddings, {total - embedding:,} to be trained" in said
    teacher = AutoModelForCausalLM.from_pretrained(stranger.teacher)
    expected = cut_student(teacher, Cut(layers=1)).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in student.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == stranger.tokenizer.get_vocab()
    with pytest.raises(Refusal, match="is there already and not an empty folder; give another --out"):
        training.shrink(recipe_path, out, cut)
    with pytest.raises(Refusal, match=r"the recipe has no student.from_teacher"):
        training.shrink(recipe_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "override: training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("training.tokens=many", "override: training.tokens: expected a valid integer; came 'many'"),
        ("data.train.path=nowhere", "data.train.path: no file, folder or match at 'nowhere'"),
        ("data.train.text=content", "no field 'content'; it has 'id', 'body'"),
    ],
)
def test_refusals_exit_with_2_and_write_nothing(
    override: str,
    message: str,
    recipe_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for verb in ("distill", "check"):
        monkeypatch.setattr("sys.argv", ["tailkd", verb, str(recipe_path), override])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert "Traceback" not in captured
        assert not (tmp_path / "run").exists()


def test_reports_of_what_is_no_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tailkd", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is not a run folder: it holds no recipe.yaml" in capsys.readouterr().err


def test_schema(recipe_path: Path, tmp_path: Path) -> None:
    schema = json.loads(tailkd("schema")[0])
    assert schema["additionalProperties"] is False
    training = schema["$defs"]["Training"]["properties"]
    assert training["learning_rate"]["exclusiveMinimum"] == 0
    assert training["clip_norm"]["description"] == "Bound of the gradient norm."
    assert "$schema=recipe.schema.json" in tailkd("schema", "--out", str(tmp_path / "recipe.schema.json"))[0]
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == schema


def test_doctor_and_version() -> None:
    assert "torch" in tailkd("doctor")[0]
    assert tailkd("--version")[0].startswith("tailkd 0.")
