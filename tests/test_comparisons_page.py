"""The commands of docs/comparisons.md, as they stand there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
from typer.testing import CliRunner

from tailkd import cli
from tailkd.report import figures

PAGE = Path(__file__).parents[1] / "docs" / "comparisons.md"


def test_the_commands_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "_svg", lambda draw: "<svg></svg>")  # most of the time, and drawn elsewhere
    builders.write_corpus(tmp_path / "corpus.jsonl")
    for name in ("teacher", "student"):
        shutil.copytree(getattr(stranger, name), tmp_path / name)
    text = PAGE.read_text("utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "pair.yaml").write_text(recipe)
    commands = re.findall(r"^tailkd (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    told = [command(line) for line in commands]
    forward, tad = "pair-divergence=forward_kl", "pair-divergence=tail_aware"
    assert f"At the end, less {forward}" in told[1]
    assert f"At the end, {tad} (2 seeds) against {forward}: " in told[1]
    assert "The noise is that of 2 seeds and of the sample (" in told[1]
    assert "warning: The divergence has another total weight" in told[1]
    assert f"{tad} (2 seeds)" in (tmp_path / "page.html").read_text("utf-8")
    found = json.loads(told[2])
    assert [len(method["runs"]) for method in found["methods"]] == [2, 2]
    assert found["sections"][0]["x"] > 2_500


def command(line: str) -> str:
    """What a command prints; a pattern stands for the folders that it matches."""
    arguments = []
    for word in line.split():
        found = [path for path in Path.cwd().glob(word.rstrip("/")) if path.is_dir()]
        arguments += sorted(map(str, found)) if "*" in word else [word]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
