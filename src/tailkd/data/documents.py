"""Whole documents side by side in rows: attention, positions and the mean tail mass stay inside each of them."""

from __future__ import annotations

import numpy as np

from tailkd.data.packing import IGNORED, Row, Rows
from tailkd.data.tokens import TokenStore

OPEN = 256  # the newest rows, into which a document may still go


class DocumentRows(Rows):
    """Rows of `context` positions with one document after the other, each as if it stood alone.

    A document's sequence starts with the begin token (if rows have one and it does not start with it anyway); position
    t reads its token t and predicts token t + 1, so that without a begin token the first one is only read. Documents
    go in order into the first of the newest `OPEN` rows that has room: a pure function of their lengths and the
    context. What is left of a row is filled with ignored labels, in a segment of its own.

    A document longer than a row is cut into several where all of it is learned. Of an example the last `context`
    positions stay, after the begin token: its prompt is cut at the left. An answer that the cut goes through is not
    learned, and an example without a whole answer is dropped; its end token is never cut off.

    cut, dropped: how many examples lost the left of their prompt, and how many are not shown at all.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, *, context: int, begin: int | None, end: int) -> None:
        super().__init__(store, documents, context=context, begin=begin, end=end)
        self.cut = self.dropped = 0
        self._pieces = self._cut_pieces()
        sizes = self._pieces[:, 1] - self._pieces[:, 0]
        rows = first_fit(sizes, context)
        self._order = np.argsort(rows, kind="stable")
        self._borders = np.searchsorted(rows[self._order], np.arange(rows.max(initial=-1) + 2))
        self.predicted = int(sizes.sum())

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, row: int) -> Row:
        filled = [np.zeros(self.context, dtype=np.int64) for _ in range(4)]
        input_ids, labels, segments, positions = filled
        input_ids.fill(self.end)
        labels.fill(IGNORED)
        at, numbers = 0, self._order[self._borders[row] : self._borders[row + 1]]
        for segment, number in enumerate(numbers):
            reads, predicts = self._sequence(*self._pieces[number])
            place = slice(at, at + len(reads))
            input_ids[place], labels[place] = reads, predicts
            segments[place], positions[place] = segment, np.arange(len(reads))
            at += len(reads)
        segments[at:], positions[at:] = len(numbers), np.arange(self.context - at)
        return Row(input_ids, labels, segments, positions)

    def _sequence(self, start: int, stop: int, unlearned: int) -> tuple[np.ndarray, np.ndarray]:
        """What a piece reads and what it predicts: the store's tokens `start` to `stop`, without the first few."""
        tokens = self.store.tokens[start:stop].astype(np.int64)
        before = self.store.tokens[start - 1] if self.begin is None else self.begin
        labels = np.where(self.learned(start, stop), tokens, IGNORED)
        labels[:unlearned] = IGNORED
        return np.concatenate([[before], tokens[:-1]]), labels

    def _cut_pieces(self) -> np.ndarray:
        """(start, stop, unlearned) of each piece: the tokens that it predicts, and how many of the first unlearned."""
        starts, stops = self.store.offsets[self.documents], self.store.offsets[self.documents + 1]
        starts = starts + (1 if self.begin is None else self.store.tokens[starts] == self.begin)
        whole = np.stack([starts, stops, np.zeros_like(starts)], -1)
        sizes, of = stops - starts, np.arange(len(starts))
        fits = (sizes > 0) & (sizes <= self.context)
        found, owners = [whole[fits]], [of[fits]]
        for index in np.flatnonzero(sizes > self.context):
            pieces = self._fitting(int(starts[index]), int(stops[index]))
            found.append(np.asarray(pieces, dtype=np.int64).reshape(-1, 3))
            owners.append(np.full(len(pieces), index))
        return np.concatenate(found)[np.argsort(np.concatenate(owners), kind="stable")]

    def _fitting(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The pieces of a document that is longer than a row."""
        if self.store.loss is None:
            return [(at, min(at + self.context, stop), 0) for at in range(start, stop, self.context)]
        first = stop - self.context
        learned = self.learned(first, stop)
        inside = bool(self.learned(first - 1, first)[0])  # the cut goes through an answer
        unlearned = int(np.argmin(learned)) if inside else 0
        if not learned[unlearned:].any() or (inside and learned.all()):
            self.dropped += 1
            return []
        self.cut += 1
        return [(first, stop, unlearned)]


def first_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each size: the first of the newest `OPEN` rows with room for it, or a new one.

    ``first_fit(np.array([3, 4, 2, 1]), 5)`` is ``[0, 1, 0, 1]``.
    """
    room, rows, count = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(sizes), dtype=np.int64), 0
    for index, size in enumerate(sizes.tolist()):
        oldest = max(0, count - OPEN)
        fits = room[oldest:count] >= size
        row = oldest + int(fits.argmax()) if fits.any() else count
        if row == count:
            room[row], count = capacity, count + 1
        room[row] -= size
        rows[index] = row
    return rows
