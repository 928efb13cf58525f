"""F30 and F14, whole runs: a corpus, a key or an optimizer that is another one than the run began with."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd.errors import Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.report.record import Run


def interrupted(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(40, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(recipe)


def test_f30_an_edited_corpus(
    recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(stranger.corpus, corpus)
    recipe["data"]["train"]["path"] = str(corpus)
    interrupted(recipe, monkeypatch)
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:-7]))
    with pytest.raises(Refusal, match=r"was saved by another recipe:\n  data \(content\): was '[0-9a-f]{32}', is "):
        tailkd.distill(recipe)
    shutil.copy(stranger.corpus, corpus)
    assert tailkd.distill(recipe).finished


def test_f14_identity(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe, monkeypatch)
    with pytest.raises(Refusal, match=r"objective.top_k: was 5, is 6\n.*--allow-change KEY"):
        tailkd.distill(recipe, **{"objective.top_k": 6})
    run = tailkd.distill(recipe, allow_change=["objective.top_k"], **{"objective.top_k": 6})
    assert run.recipe["objective"]["top_k"] == 6


def test_f14_the_optimizer_applies_and_is_said(
    recipe: dict[str, Any], whole: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(recipe, monkeypatch)
    run = tailkd.distill(recipe, **{"training.learning_rate": 5e-4})
    assert "training.learning_rate: was 0.001, is 0.0005" in capfd.readouterr().err
    rates = [
        (r["learning_rate"], w["learning_rate"]) for r, w in zip(run.metrics, whole.metrics, strict=True) if "loss" in r
    ]
    assert [round(ours / theirs, 6) for ours, theirs in rates] == [1.0] * 4 + [0.5] * 8
    with pytest.raises(Refusal, match=r"training.learning_rate: was 0.0005, is 0.001"):
        tailkd.distill(recipe)  # finished: nothing is left to which another rate could apply


def test_a_moved_run_goes_on(
    recipe: dict[str, Any], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, monkeypatch)
    shutil.copytree(recipe["out"], tmp_path / "elsewhere")
    run = tailkd.distill(recipe, out=str(tmp_path / "elsewhere"), name="other")
    running.assert_same(run, whole)
    assert json.loads((tmp_path / "elsewhere" / "exit.json").read_text())["exit_code"] == 0
