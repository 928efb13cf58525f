"""The teacher inside the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.models.head import SplitModel
from tailkd.objective.head import Head
from tailkd.objective.signal import Dense


class LiveTeacher:
    """A callable that turns a batch into the teacher's head, without gradient and in evaluation mode.

    It lives outside the student's module tree: never in its checkpoint, its optimizer or its mode. The model may be
    sharded by FSDP2 of its own; its blocks are then gathered one at a time, the rest of it once and kept.
    """

    def __init__(
        self,
        model: Any,
        *,
        usable: int,
        compute_dtype: torch.dtype = torch.float32,
        fold: Mapping[int, int] | None = None,
    ) -> None:
        frozen = model.eval().requires_grad_(False)
        self.usable, self.fold = usable, dict(fold or {})
        self.split = SplitModel(frozen, usable=usable, compute_dtype=compute_dtype).prove()
        # Folded ids lie beyond the usable rows.
        self._whole = SplitModel(frozen, compute_dtype=compute_dtype) if fold else self.split

    def __call__(self, batch: Batch) -> Head | Dense:
        with torch.no_grad():
            return self._signal(self._whole(batch.input_ids, batch.position_ids))

    def with_states(self, batch: Batch, states: Sequence[int]) -> tuple[Head | Dense, tuple[Tensor, ...]]:
        """The signal and hidden states from within, see `SplitModel.with_states`."""
        with torch.no_grad():
            head, found = self._whole.with_states(batch.input_ids, states, batch.position_ids)
            return self._signal(head), found

    def _signal(self, head: Head) -> Head | Dense:
        return Dense((head,), usable=self.usable, fold=self.fold) if self.fold else head
