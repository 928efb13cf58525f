"""A really pretrained model, its own tokenizer and real text, from the folder that TAILKD_DATA names."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

import tailkd

DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
MODEL, TEXT = DATA / "models" / "stories260k", DATA / "instruct" / "gsm8k_train.jsonl.gz"
pytestmark = pytest.mark.skipif(not (MODEL.is_dir() and TEXT.is_file()), reason="TAILKD_DATA names no data folder")


def test_a_pretrained_student_of_itself_has_nothing_to_learn_from_the_teacher(tmp_path: Path) -> None:
    corpus = tmp_path / "questions.jsonl"
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line, _ in zip(lines, range(60), strict=False)]
    corpus.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    run = tailkd.distill(
        {
            "name": "itself",
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(MODEL)},
            "student": {"model": str(MODEL)},
            "data": {"train": {"path": str(corpus), "text": "question"}, "context": 64},
            "objective": {"divergence": "tail_aware", "clm_weight": 0.0},
            "training": {"tokens": 1_000, "batch_size": 4, "learning_rate": 1e-5},
            "evaluate": {"tokens": 500},
        }
    )
    before, after, teacher = (run.evaluation[role] for role in ("student_before", "student", "teacher"))
    assert before["kl"] == pytest.approx(0, abs=1e-5)
    assert after["kl"] == pytest.approx(0, abs=1e-3)
    assert after["cross_entropy"] == pytest.approx(teacher["cross_entropy"], abs=1e-2)
    assert teacher["cross_entropy"] < 4.5  # 512 ids: a model that knows nothing has 6.2
    assert run.samples["student"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["rows", "documents"])
def test_a_pretrained_student_learns_answers(packing: str, tmp_path: Path) -> None:
    """GSM8K's training questions and answers, straight from their packed file, by a recipe of two keys more."""
    run = tailkd.distill(
        {
            "name": packing,
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(MODEL)},
            "student": {"model": str(MODEL)},
            "data": {
                "train": {"path": str(TEXT), "prompt": "question", "completion": "answer"},
                "heldout": {"fraction": 0.01},
                "packing": packing,
                "context": 256,
                "store": str(tmp_path / "store"),
            },
            "training": {"tokens": 30_000, "batch_size": 8, "learning_rate": 1e-3},
            "evaluate": {"tokens": 4_000},
        }
    )
    before, after = (run.evaluation[role] for role in ("student_before", "student"))
    assert run.data["train"]["documents"] + run.data["heldout"]["documents"] == 7_473
    assert (run.data["train"]["cut"] > 0) == (packing == "documents")
    assert before["kl"] == pytest.approx(0, abs=1e-5)
    assert after["cross_entropy"] < before["cross_entropy"] - 0.2
