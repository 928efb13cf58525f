"""No connection is opened without being asked for: every verb of a local run, with a guard on Python's sockets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
import running

GUARD = """
import os, sys
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(name, None)
attempts = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if event != "socket.connect" or arguments[0].family.name != "AF_UNIX":
            attempts.append(f"{event} {arguments}")
            raise ConnectionError(f"no connection was asked for: {attempts[-1]}")
sys.addaudithook(guard)
"""

END = """
print("ATTEMPTS", *attempts)
"""


def attempts(code: str) -> str:
    """What a fresh process that runs this code tried to reach; the hub is not switched off in it."""
    done = builders.fresh_python(GUARD + code + END)
    return done.stdout.splitlines()[-1].removeprefix("ATTEMPTS").strip()


def test_the_guard_sees_connections() -> None:
    found = attempts("import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9))\nexcept OSError:\n    pass\n")
    assert "127.0.0.1" in found


@pytest.mark.slow
def test_training_evaluating_and_reporting_reach_nothing(stranger: SimpleNamespace, tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe = running.small(stranger, out, tokens=2 * 8 * 24, save_every_tokens=None)
    file.write_text(json.dumps(recipe | {"evaluate": {"tokens": 200}}))
    assert not attempts(f"""
from tailkd.cli import app
for line in (["check", {str(file)!r}], ["ledger", {str(file)!r}], ["distill", {str(file)!r}], ["status", {str(out)!r}],
             ["evaluate", {str(out)!r}], ["report", {str(out)!r}]):
    app(line, standalone_mode=False)
""")
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_the_demo_reaches_nothing(tmp_path: Path) -> None:
    """The same code with a smaller corpus and fewer tokens."""
    out = tmp_path / "demo"
    assert not attempts(f"""
from tailkd import demo
from tailkd.cli import app
demo.CORPUS_BYTES = 300_000
demo.TEACHER_TRAINING["tokens"] = demo.STUDENT_TRAINING["tokens"] = 2_000
demo.EVALUATION.update(tokens=1_000, every_tokens=1_000)
app(["demo", "--out", {str(out)!r}], standalone_mode=False)
""")
    assert (out / "report.html").is_file()
