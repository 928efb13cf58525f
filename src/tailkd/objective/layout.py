"""Where the valid positions of a batch lie, known on the host so that no device has to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Valid positions of a (batch, sequence) block and the sequences they belong to.

    valid: int64 (n,), positions with a label, counted over the flattened block.
    row_borders: where each row begins among `valid`, and the end (batch + 1 numbers).
    group: int64 (n,), for each valid position the sequence whose mean tail mass it shares.
    groups: how many sequences there are. rows_of_groups: int64 (groups,), for each of them its row.
    """

    valid: Tensor
    row_borders: tuple[int, ...]
    group: Tensor
    groups: int
    rows_of_groups: Tensor

    @property
    def count(self) -> int:
        return len(self.valid)

    def to(self, device: torch.device) -> Layout:
        """The same with its tensors on a device: copied once, early: a copy waits for all work queued there before."""
        valid, group, rows = (
            one.to(device, non_blocking=True) for one in (self.valid, self.group, self.rows_of_groups)
        )
        return Layout(valid, self.row_borders, group, self.groups, rows)

    def pieces(self, limit: int) -> Iterator[tuple[int, int, bool]]:
        """Runs (start, stop, whole) of valid positions: as many whole rows as fit `limit`, or parts of a longer row."""
        start = 0
        for begin, end in zip(self.row_borders, self.row_borders[1:], strict=False):
            if end - start <= limit:
                continue
            if begin > start:
                yield start, begin, True
            start = begin
            if end - begin > limit:
                for part in range(begin, end, limit):
                    yield part, min(part + limit, end), False
                start = end
        if self.count > start:
            yield start, self.count, True


def layout_of(labels: Tensor, segments: Tensor | None = None) -> Layout:
    """The layout of labels (batch, sequence), -100 where there is none; waits for the device that they are on."""
    labels = labels.detach().cpu()
    valid = (labels.flatten() != -100).nonzero().squeeze(-1)
    borders = torch.searchsorted(valid, torch.arange(len(labels) + 1) * labels.shape[1]).tolist()
    return with_sequences(valid, borders, labels.shape[1], None if segments is None else segments.detach().cpu())


def with_sequences(valid: Tensor, row_borders: Sequence[int], width: int, segments: Tensor | None) -> Layout:
    """A layout from valid positions and row borders; the mean tail mass is per row, or per (row, segment)."""
    row = valid // width
    if segments is None:
        rows = len(row_borders) - 1
        return Layout(valid, tuple(row_borders), row, rows, torch.arange(rows))
    pairs = torch.stack([row, segments.flatten()[valid]], -1)
    unique, group = torch.unique(pairs, dim=0, return_inverse=True)
    return Layout(valid, tuple(row_borders), group, len(unique), unique[:, 0])
