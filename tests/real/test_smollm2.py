"""A really pretrained teacher out of a quantised GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tailkd
from tailkd import pretrained
from tailkd.models import load

pytestmark = pytest.mark.real
CPU = torch.device("cpu")


@pytest.mark.timeout(900)
def test_it_knows_the_capital_of_france(smollm2: Path) -> None:
    options = {"gguf_file": pretrained.TEACHER_FILE}
    tokenizer = load.load_tokenizer("teacher", str(smollm2), **options)
    model = load.load_model("teacher", str(smollm2), dtype=torch.float32, device=CPU, **options)
    assert tokenizer is not None
    assert len(tokenizer) == 49_152
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.timeout(1800)
def test_a_student_cut_out_of_it_learns(smollm2: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    words = "The river runs past the old mill, and the miller's daughter counts its turns. "
    corpus.write_text("".join(json.dumps({"text": f"{number}. {words * 3}"}) + "\n" for number in range(80)))
    cut = {"layers": 2, "intermediate_size": 64, "embeddings": "copy", "freeze_embeddings": True}
    run = tailkd.distill(
        {
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(smollm2), "gguf_file": pretrained.TEACHER_FILE},
            "student": {"from_teacher": cut},
            "data": {"train": {"path": str(corpus)}, "context": 64},
            "objective": {"divergence": "tail_aware", "hidden": {"weight": 1.0}},
            "training": {"tokens": 1_000, "batch_size": 2, "learning_rate": 1e-3},
            "evaluate": {"tokens": 200, "batch_size": 2},
        }
    )
    assert run.evaluation["student"]["kl"] < run.evaluation["student_before"]["kl"]
