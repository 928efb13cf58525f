"""`check --load`: what the first steps on this machine say of the whole run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import running
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tailkd
from tailkd import cli, parts, recipe_file, trial
from tailkd import run as way


def silent(message: str) -> None:
    """For `say`."""


def test_speed_memory_and_the_teacher_without_a_run_folder(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    recipe["data"]["bos"] = "always"
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    shown = CliRunner().invoke(cli.app, ["check", str(path), "--load", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)["load"]
    assert found["tokens_per_second"] > 0
    assert found["hours"] * 3600 > 12 * 8 * 24 / found["tokens_per_second"]
    assert found["peak_bytes"] > 0
    assert found["dropped_teacher_mass"] == 0
    assert list(tmp_path.iterdir()) == [path]
    teacher = AutoModelForCausalLM.from_pretrained(stranger.teacher)
    rows = parts.build(recipe_file.read(recipe), silent).heldout_rows
    ids = torch.stack([torch.from_numpy(rows[i].labels) for i in range(4)])  # the text alone
    begun = torch.cat([torch.zeros(4, 1, dtype=torch.long), ids], 1)  # the begin token is 0
    for name, inputs in (("with_begin", begun), ("without_begin", ids)):
        with torch.no_grad():
            logits = teacher(input_ids=inputs[:, :-1]).logits[:, -23:]
        expected = cross_entropy(logits.flatten(0, 1), inputs[:, -23:].flatten()).exp()
        assert found["teacher_perplexity"][name] == pytest.approx(float(expected), rel=1e-4)


def test_neither_teacher_nor_begin_token(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    alone = {**recipe, "teacher": None, "objective": {"divergence": "none"}}
    found = trial.load(recipe_file.read(alone), silent)
    assert found["teacher_perplexity"] is found["dropped_teacher_mass"] is None
    tokenizer = builders.build_tokenizer([json.loads(line)["body"] for line in stranger.corpus.open()])
    tokenizer.bos_token = None
    for role, seed in (("teacher", 1), ("student", 2)):
        recipe[role] = {"model": str(builders.save_model(tmp_path / role, tokenizer, seed=seed))}
    found = trial.load(recipe_file.read(recipe), silent)
    assert found["teacher_perplexity"]["with_begin"] is None
    assert found["teacher_perplexity"]["without_begin"] == pytest.approx(
        400, rel=0.1
    )  # of a teacher with random weights


def test_a_step_is_timed_on_full_rows(stranger: SimpleNamespace, tmp_path: Path) -> None:
    rows = parts.build(recipe_file.read(running.small(stranger, tmp_path / "run")), silent).train_rows
    assert rows.predicted % rows.context  # the last row is not full
    size = len(rows) + 3
    assert trial.full_batch(rows, size).count == trial.full_batch(rows, size, 1).count == size * 24


@pytest.mark.parametrize("every", [100, 600])
def test_hours_count_every_step_and_every_evaluation(
    every: int, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were each step and each held-out batch of four rows a second, the run's own records would say how many."""
    recipe = running.small(stranger, tmp_path / "run", tokens=6 * 8 * 24, save_every_tokens=None)
    recipe["evaluate"] |= {"every_tokens": every}
    monkeypatch.setattr(trial, "_seconds", lambda work: work() is None or 1.0)
    found = trial.load(recipe_file.read(recipe), silent)
    batches = -(-400 // 24) / 4
    run = tailkd.distill(recipe)
    assert found["hours"] * 3600 == pytest.approx(6 + batches * len(run.evaluations()) + 1)  # the last save


@pytest.mark.slow
def test_hours_are_those_of_a_run_of_50_steps(
    stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = torch.cuda.is_available()
    context, hidden, layers, allowed = (256, 1024, 16, 0.1) if on_gpu else (128, 256, 4, 0.2)
    recipe: dict[str, Any] = running.small(stranger, tmp_path / "run", tokens=50 * 8 * context, save_every_tokens=None)
    recipe["data"]["context"] = context
    recipe["evaluate"] = {"every_tokens": 10 * 8 * context, "tokens": 2_000, "batch_size": 4}
    sizes = {"hidden": hidden, "layers": layers}
    for role, seed in (("teacher", 1), ("student", 2)):
        recipe[role] = {"model": str(builders.save_model(tmp_path / role, stranger.tokenizer, seed=seed, **sizes))}
    found = trial.load(recipe_file.read(recipe), silent)
    train, took = way._train, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal took
        started = time.perf_counter()
        result = train(*arguments)
        took = time.perf_counter() - started
        return result

    monkeypatch.setattr(way, "_train", timed)
    tailkd.distill(recipe)
    print(f"a run of 50 steps took {took:.2f} s, check --load said {3600 * found['hours']:.2f} s")
    assert took > 3
    assert 3600 * found["hours"] == pytest.approx(took, rel=allowed)
