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
        read = max(usable, *(source + 1 for source in self.fold), 0)
        self._whole = SplitModel(frozen, usable=read, compute_dtype=compute_dtype) if fold else self.split

    @property
    def device(self) -> torch.device:
        return self.split.device

    def __call__(self, batch: Batch) -> Head | Dense:
        return self._signal(self.head(batch))

    def head(self, batch: Batch) -> Head:
        """Over the usable rows and those up to the last folded id."""
        with torch.no_grad():
            return self._whole(batch.input_ids, batch.position_ids)

    def with_states(self, batch: Batch, states: Sequence[int]) -> tuple[Head | Dense, tuple[Tensor, ...]]:
        """The signal and hidden states from within, see `SplitModel.with_states`."""
        with torch.no_grad():
            head, found = self._whole.with_states(batch.input_ids, states, batch.position_ids)
            return self._signal(head), found

    def settle(self) -> None:
        """After calls: what FSDP2 keeps gathered of it is shards again."""
        self.split.settle()

    def _signal(self, head: Head) -> Head | Dense:
        return Dense((head,), usable=self.usable, fold=self.fold) if self.fold else head


class LiveTeachers:
    """Several teachers of one vocabulary as one: a callable that turns a batch into the mixture of their distributions.

    Equals ``p = sum(w * p_i for w, p_i in zip(weights, each)) / sum(weights)``, `p_i` over the usable ids after the
    folded ones were added; see `tailkd.objective.Dense`. Their usable ids and what is folded must be the same.
    """

    def __init__(self, each: Sequence[LiveTeacher], weights: Sequence[float]) -> None:
        assert len({(one.usable, *one.fold.items()) for one in each}) == 1
        self.each, self.weights = tuple(each), tuple(weights)

    @property
    def device(self) -> torch.device:
        return self.each[0].device

    def __call__(self, batch: Batch) -> Dense:
        first = self.each[0]
        return Dense(tuple(one.head(batch) for one in self.each), self.weights, usable=first.usable, fold=first.fold)

    def settle(self) -> None:
        for one in self.each:
            one.settle()


Teacher = LiveTeacher | LiveTeachers
