"""A really pretrained model answers real mathematics questions, to the end and with every sample logged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tailkd import pretrained
from tailkd.evaluate.mathematics import grade, solving
from tailkd.evaluate.mathematics.solving import measured
from tailkd.models import load

pytestmark = pytest.mark.real
DATA = Path(os.environ.get("TAILKD_DATA", "nowhere")) / "math"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not DATA.is_dir(), reason="TAILKD_DATA names no folder with math/")
def test_fifty_items_of_gsm8k(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 6 minutes of one core. pytest's -s shows how far it is, and the entry."""
    monkeypatch.setattr(solving, "MAX_NEW_TOKENS", 256)
    options: dict[str, Any] = {"gguf_file": pretrained.TEACHER_FILE}
    tokenizer = load.load_tokenizer("model", str(smollm2), **options)
    model = load.load_model("model", str(smollm2), dtype=torch.float32, device=torch.device("cpu"), **options)
    asked: dict[str, Any] = {"data": DATA, "prompts": None, "out": tmp_path, "limit": 50, "batch_size": 6}
    (entry,) = measured(model, tokenizer, ["gsm8k"], **asked, say=print, command="pytest")
    print({key: value for key, value in entry.items() if key != "scores"})
    samples = [json.loads(line) for line in (tmp_path / entry["samples"]).open()]
    assert len(samples) == len(entry["scores"]) == entry["items"] == 50
    assert (entry["shots"], entry["unasked"]) == (8, 0)
    assert [grade("gsm8k", sample["generated"], sample["gold"]) for sample in samples] == entry["scores"]
    assert all(sample["prompt"].startswith("Question: There are 15 trees") for sample in samples)
    assert all(0 < sample["tokens"] <= 256 for sample in samples)
    assert all("Question:" not in sample["generated"] for sample in samples if sample["finished"])
    assert 0 < entry["value"] < 0.5
    (again,) = measured(model, tokenizer, ["gsm8k"], **asked, say=print, command="pytest")
    assert again == {**entry, "seconds": None}
