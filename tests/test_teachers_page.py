"""The examples of docs/teachers.md, as they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest

import tailkd

PAGE = Path(__file__).parents[1] / "docs" / "teachers.md"


def test_the_examples_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "more"):
        builders.write_corpus(tmp_path / f"{name}.jsonl")
    for name, source in {"large": stranger.teacher, "small": stranger.student}.items():
        shutil.copytree(source, tmp_path / "models" / name)
    builders.save_model(tmp_path / "models" / "mathematics", stranger.tokenizer, hidden=16, initializer_range=0.2)
    mixture, second = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for name, text in {"mixture": mixture, "second": second}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    stage1 = tailkd.distill("mixture.yaml", out="runs/stage1")
    assert "66.7 % models/large and 33.3 % models/mathematics" in (stage1.folder / "README.md").read_text()
    stage2 = tailkd.distill("second.yaml")
    assert stage2.evaluation["student_before"]["cross_entropy"] < stage1.evaluation["student_before"]["cross_entropy"]
