"""Rows -> batches, in an order that is a pure function of (seed, global sample index)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tailkd.data import select
from tailkd.data.mixture import AnyRows, row_shown
from tailkd.data.order import mixed_seed, permuted, row_of
from tailkd.data.packing import IGNORED, Row
from tailkd.errors import Refusal

__all__ = ["Batch", "Batches", "collate", "evaluation_batches", "mixed_seed", "permuted", "row_of", "rows_per_rank"]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors (batch, context), with what the host knows about them.

    valid: int64 positions with a label, counted over the flattened batch, kept on the host.
    row_borders: where each row begins among `valid` (batch + 1 numbers).
    segment_borders: where each (row, document) run begins among `valid`, and the end.
    count: number of valid positions. samples: global sample numbers.
    position_ids: of each token in its document, where documents are apart; None where a row is one sequence. `segments`
    then has a number for each of them (and one for what is left of a row); it stays on the host.
    reference: float32 (batch, context), losses of a reference model: of each row's positions the `learned` share that
    the student exceeds most is trained on.
    keys: of each row, see `tailkd.data.packing.Row.key`.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Tensor
    valid: Tensor
    row_borders: tuple[int, ...]
    segment_borders: tuple[int, ...]
    count: int
    samples: tuple[int, ...]
    position_ids: Tensor | None = None
    reference: Tensor | None = None
    learned: float = 1.0
    keys: tuple[bytes, ...] = ()

    @property
    def sequences(self) -> Tensor | None:
        """Whose tokens share a mean tail mass, as `tailkd.objective.layout.with_sequences` takes it; None for rows."""
        return None if self.position_ids is None else self.segments

    @property
    def learned_count(self) -> int:
        """Positions that are trained on: all valid ones, or each row's learned share of them."""
        if self.reference is None:
            return self.count
        return sum(select.share_of(end - begin, self.learned) for begin, end in pairwise(self.row_borders))

    def __len__(self) -> int:
        return len(self.input_ids)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """The same rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self._rows(slice(start, start + size))

    def part(self, rank: int, world: int) -> Batch:
        """One rank's rows: ``torch.cat([batch.part(r, world).input_ids for r in range(world)]) == batch.input_ids``.

        Its count is of its own positions; a loss is divided by that of the whole batch.
        """
        size = rows_per_rank(len(self), world)
        return self if world == 1 else self._rows(slice(rank * size, (rank + 1) * size))

    def _rows(self, part: slice) -> Batch:
        position_ids = None if self.position_ids is None else self.position_ids[part]
        rows = _batch(self.input_ids[part], self.labels[part], self.segments[part], self.samples[part], position_ids)
        reference = None if self.reference is None else self.reference[part]
        return replace(rows, reference=reference, learned=self.learned, keys=self.keys[part])

    def to(self, device: torch.device) -> Batch:
        """The same with what models and losses read on a device."""
        input_ids, labels, position_ids, reference = (
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.input_ids, self.labels, self.position_ids, self.reference)
        )
        assert input_ids is not None
        assert labels is not None
        return replace(self, input_ids=input_ids, labels=labels, position_ids=position_ids, reference=reference)


def rows_per_rank(batch_size: int, world: int) -> int:
    """``batch_size / world``; refused where ranks would get different numbers of rows."""
    size, left = divmod(batch_size, world)
    if left:
        near = f"{size * world:,} or {(size + 1) * world:,}" if size else f"{world:,}"
        raise Refusal(
            f"training.batch_size is {batch_size:,}, which does not divide by {world:,} processes; take {near}, or "
            "another number of processes (the same batch on every number of them gives the same run)"
        )
    return size


def collate(rows: Sequence[Row], samples: Sequence[int]) -> Batch:
    """Rows as one batch."""

    def stacked(parts: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(list(parts)))

    positions = [row.positions for row in rows if row.positions is not None]
    batch = _batch(
        stacked(row.input_ids for row in rows),
        stacked(row.labels for row in rows),
        stacked(row.segments for row in rows),
        tuple(samples),
        stacked(positions) if positions else None,
    )
    batch = replace(batch, keys=tuple(row.key for row in rows))
    references = [row.reference for row in rows if row.reference is not None]
    return replace(batch, reference=stacked(references), learned=rows[0].learned) if references else batch


def _batch(
    input_ids: Tensor, labels: Tensor, segments: Tensor, samples: tuple[int, ...], position_ids: Tensor | None
) -> Batch:
    valid = (labels.flatten() != IGNORED).nonzero().squeeze(-1)
    context = labels.shape[1]
    row_borders = torch.searchsorted(valid, torch.arange(len(labels) + 1) * context)
    places = (valid // context) * context + segments.flatten()[valid]  # a number per (row, document)
    new = torch.ones_like(places, dtype=torch.bool)
    new[1:] = places[1:] != places[:-1]
    borders = (*new.nonzero().squeeze(-1).tolist(), len(valid))
    rows, count = tuple(row_borders.tolist()), len(valid)
    return Batch(input_ids, labels, segments, valid, rows, borders, count, samples, position_ids)


class Batches:
    """Global batches by step number: ``batches[step]`` shows samples step * size to (step + 1) * size - 1."""

    def __init__(self, rows: AnyRows, *, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def __getitem__(self, step: int) -> Batch:
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        return collate([self.rows[row_shown(self.rows, s, self.seed)] for s in samples], samples)


def evaluation_batches(rows: AnyRows, *, tokens: int | None, batch_size: int) -> Iterator[Batch]:
    """Rows for evaluation, in a fixed order spread over the run, until `tokens` positions are covered.

    Sample s shows row ``row_of(s, len(rows), 0)``.
    """
    count = len(rows) if tokens is None else min(len(rows), -(-tokens // rows.context))
    for start in range(0, count, batch_size):
        samples = range(start, min(start + batch_size, count))
        yield collate([rows[row_of(s, len(rows), 0)] for s in samples], samples)
