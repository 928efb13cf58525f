"""What tests of the step are made of: eight short rows, a student and a teacher."""

from __future__ import annotations

import builders
import numpy as np
import torch

from tailkd.data.batches import Batch, Batches
from tailkd.data.packing import Rows
from tailkd.models.head import SplitModel
from tailkd.teacher.live import LiveTeacher

VOCABULARY = 120


def rows(lengths: list[int]) -> Rows:
    """Documents of these lengths in rows of 14 positions."""
    store = builders.numbered_store(lengths)
    return Rows(store, np.arange(len(lengths)), context=14, begin=0, end=1)  # type: ignore[arg-type]


def eight_rows() -> Batch:
    """Eight rows, one of them mostly empty."""
    made = rows([20, 13, 31, 9, 33])
    assert len(made) == 8
    return Batches(made, batch_size=8, seed=0)[0]


def pair(dtype: torch.dtype) -> tuple[SplitModel, LiveTeacher]:
    student = SplitModel(builders.build_model(VOCABULARY, seed=2).to(dtype))
    return student, LiveTeacher(builders.build_model(VOCABULARY, hidden=48, seed=1).to(dtype), usable=VOCABULARY)
