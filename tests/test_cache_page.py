"""The examples of docs/cache.md, as they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
from typer.testing import CliRunner

from tailkd import cli
from tailkd.report.record import Run

PAGE = Path(__file__).parents[1] / "docs" / "cache.md"


def test_the_examples_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    builders.write_corpus(tmp_path / "corpus.jsonl", documents=60)
    for name, source in {"large": stranger.teacher, "small": stranger.student}.items():
        shutil.copytree(source, tmp_path / "models" / name)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (commands,) = re.findall(r"```\n(tailkd .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for line in commands.splitlines():
        if line.startswith("tailkd"):
            done = CliRunner().invoke(cli.app, line.split()[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
    assert Run(tmp_path / "runs" / "cached").evaluation["student"]["kl"] > 0
    assert Run(tmp_path / "runs" / "other").evaluation["student"]["kl"] > 0
    assert Run(tmp_path / "runs" / "alone").evaluation["student"]["kl"] is None
    assert "7 top_k + 3 tail_samples + 8: 174" in PAGE.read_text("utf-8")
