"""The teacher inside the step."""

from __future__ import annotations

from typing import Any

import torch

from tailkd.data.batches import Batch
from tailkd.models.head import SplitModel
from tailkd.objective.head import Head


class LiveTeacher:
    """A callable that turns a batch into the teacher's head, without gradient and in evaluation mode.

    It lives outside the student's module tree: never in its checkpoint, its optimizer or its mode. The model may be
    sharded by FSDP2 of its own; its blocks are then gathered one at a time, the rest of it once and kept.
    """

    def __init__(self, model: Any, *, usable: int, compute_dtype: torch.dtype = torch.float32) -> None:
        frozen = model.eval().requires_grad_(False)
        self.split = SplitModel(frozen, usable=usable, compute_dtype=compute_dtype).prove()

    def __call__(self, batch: Batch) -> Head:
        with torch.no_grad():
            return self.split(batch.input_ids)
