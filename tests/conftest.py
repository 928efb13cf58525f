from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; read when huggingface_hub is imported
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
