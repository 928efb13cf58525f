from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One thread: tiny models are no faster on two, and a process forked after OpenMP has started threads hangs. Read when
# torch is imported, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import builders
import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; read when huggingface_hub is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU; read when triton is imported
hypothesis.settings.register_profile("tailkd", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tailkd")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No test writes into the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TAILKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Corpus, tokenizer, teacher and student that the project has never seen, as folders and files."""
    folder = tmp_path_factory.mktemp("stranger")
    corpus = builders.write_corpus(folder / "corpus.jsonl", field="body")
    tokenizer = builders.build_tokenizer([json.loads(line)["body"] for line in corpus.open()])
    teacher = builders.save_model(folder / "teacher", tokenizer, hidden=48, seed=1, initializer_range=0.2)
    student = builders.save_model(folder / "student", tokenizer, hidden=32, seed=2)
    return SimpleNamespace(folder=folder, corpus=corpus, tokenizer=tokenizer, teacher=teacher, student=student)


@pytest.fixture
def recipe(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """The recipe of the documentation with the stranger's paths, small enough for a test."""
    return {
        "name": "stranger",
        "out": str(tmp_path / "run"),
        "teacher": {"model": str(stranger.teacher), "revision": None, "dtype": "auto", "attention": "auto"},
        "student": {"model": str(stranger.student)},
        "data": {
            "train": {"path": str(stranger.corpus), "text": "body"},
            "heldout": {"fraction": 0.1},
            "context": 48,
            "bos": "auto",
        },
        "objective": {
            "divergence": "tail_aware",
            "top_k": 5,
            "beta": 2.0,
            "temperature": 1.0,
            "clm_weight": 1.0,
            "divergence_weight": 1.0,
        },
        "training": {
            "tokens": 6_000,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1.0e-3,
            "seed": 3,
            "save_every_tokens": 2_000,
            "precision": "auto",
        },
        "evaluate": {"every_tokens": 2_000, "tokens": 2_000},
    }


# ----- every message that tailkd raises must be raised by some test


RAISED: set[tuple[str, int]] = set()


def pytest_configure(config: pytest.Config) -> None:
    from tailkd import errors

    plain = errors.Refusal.__init__

    def noted(self: errors.Refusal, *arguments: object) -> None:
        frame = sys._getframe(1)
        RAISED.add((frame.f_code.co_filename, frame.f_lineno))
        plain(self, *arguments)

    errors.Refusal.__init__ = noted  # type: ignore[method-assign]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a whole green run: name each `Refusal` in the sources that no test has raised, and fail."""
    if exitstatus or session.config.args != session.config.getini("testpaths"):
        return
    silent = [f"{path.name}:{first}" for path, first, last in _refusals() if not _seen(path, first, last)]
    if silent:
        print("\nmessages that no test has raised:", *silent)
        session.exitstatus = 1


def _refusals() -> Iterator[tuple[Path, int, int]]:
    import tailkd

    for path in Path(tailkd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                yield path, node.lineno, node.end_lineno or node.lineno


def _seen(path: Path, first: int, last: int) -> bool:
    return any(name == str(path) and first <= line <= last for name, line in RAISED)
