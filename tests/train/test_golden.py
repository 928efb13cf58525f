"""Loss curves of 50 steps per divergence, against curves in the repository.

The tolerance leaves room for other processors and thread counts (float32 sums in another order), not for another
method. A change that means to move a curve writes it anew with ``PYTHONPATH=tests python tests/train/test_golden.py``
and says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import builders
import numpy as np
import pytest
import torch

from tailkd.data.batches import Batches
from tailkd.data.packing import Rows
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.objective.settings import DIVERGENCES
from tailkd.teacher.live import LiveTeacher
from tailkd.train.optim import Schedule, build_optimizer
from tailkd.train.step import Step

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS, VOCABULARY = 50, 220


def curve(divergence: str) -> list[float]:
    """Loss of each step of a small training run."""
    lengths = [17 + 7 * (i % 5) for i in range(6)]
    rows = Rows(builders.numbered_store(lengths), np.arange(6), context=16, begin=0, end=1)  # type: ignore[arg-type]
    batches = Batches(rows, batch_size=4, seed=5)
    student = SplitModel(builders.build_model(VOCABULARY, hidden=24, seed=2))
    sharp = builders.build_model(VOCABULARY, hidden=32, seed=1, initializer_range=0.1)
    teacher = LiveTeacher(sharp, usable=VOCABULARY)
    optimizer = build_optimizer(student.model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = Schedule(3e-3, STEPS)
    update = Step(
        student, teacher, Objective(divergence=divergence, top_k=5), optimizer, micro_batch_size=2, clip_norm=1.0
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        result = update(batches[step])
        losses.append(result.parts["loss"].mean())
    return losses


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_curve_is_the_golden_one(divergence: str) -> None:
    golden = json.loads(GOLDEN.read_text())[divergence]
    found = curve(divergence)
    assert found == pytest.approx(golden, rel=2e-4)
    assert found[-1] < found[0]


if __name__ == "__main__":
    torch.manual_seed(0)
    GOLDEN.write_text(json.dumps({name: [round(v, 6) for v in curve(name)] for name in DIVERGENCES}, indent=1) + "\n")
