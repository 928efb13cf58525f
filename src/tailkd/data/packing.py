"""Token runs -> fixed rows, with document borders; and which documents are held out."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xxhash

from tailkd.data.tokens import TokenStore
from tailkd.errors import Refusal

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One training row: what position t reads, what it predicts (-100: nothing), which document it stands in.

    positions: of each token in its document, where documents are apart; None where the row is one sequence.
    reference: a reference model's losses, of which the `learned` share that the student exceeds most is trained on.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    positions: np.ndarray | None = None
    reference: np.ndarray | None = None
    learned: float = 1.0

    @property
    def key(self) -> bytes:
        """16 bytes, a hash of what a model's outputs depend on, ids and positions, and of where labels are."""
        digest = xxhash.xxh3_128(len(self.input_ids).to_bytes(8, "little"))
        digest.update(self.input_ids.astype("<i8", copy=False).tobytes())
        digest.update(np.packbits(self.labels != IGNORED).tobytes())
        if self.positions is not None:
            digest.update(self.positions.astype("<i8", copy=False).tobytes())
        return digest.digest()


class Rows:
    """Chosen documents of a store as one run of tokens, cut into rows of `context` positions.

    Every token of the run is predicted exactly once: row r predicts tokens ``r * context`` to ``(r + 1) * context - 1``
    from the tokens before them, its first one from the begin token if rows start with one. Without a begin token the
    very first token of the run has nothing before it and is only read. The last row is filled up with ignored labels.
    What follows a document that was cut off (it has no end token) is no continuation of it: that label is ignored, and
    in documents of which only answers are learned the others.

    cut, dropped: examples that lost the left of their prompt, or are not shown; none here, where rows take any length.
    """

    cut = dropped = 0
    choice = ""  # fingerprint of what was chosen of them

    def __init__(self, store: TokenStore, documents: np.ndarray, *, context: int, begin: int | None, end: int) -> None:
        lengths = store.offsets[documents + 1] - store.offsets[documents]
        self.store, self.documents, self.context, self.begin, self.end = store, documents, context, begin, end
        self.borders = np.concatenate([[0], np.cumsum(lengths)])  # of the documents, in the run
        self.tokens = int(self.borders[-1])
        self.predicted = self.tokens - (begin is None)

    @property
    def fingerprint(self) -> str:
        """Of all that the rows depend on: the documents in their order, how they became tokens, how they are cut."""
        made_of = self.store.manifest["made_of"]
        how = [made_of["tokenizer"], made_of["end_token"], made_of["usable"], self.context, self.begin, self.end]
        how += [type(self).__name__, made_of.get("rules"), made_of.get("chat")]
        digest = xxhash.xxh3_128(json.dumps(how).encode())
        digest.update(self.store.hashes[self.documents].tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return -(-self.predicted // self.context)

    def __getitem__(self, row: int) -> Row:
        first = row * self.context + (self.begin is None)  # the run's index of the first predicted token
        run, learned, segments = self._run(max(first - 1, 0), min(first + self.context, self.tokens))
        if self.begin is not None:
            if first > 0:
                run, learned, segments = run[1:], learned[1:], segments[1:]
            run, segments = np.concatenate([[self.begin], run]), np.concatenate([segments[:1], segments])
            learned = np.concatenate([[False], learned])
        count = len(run) - 1
        input_ids = np.full(self.context, self.end, dtype=np.int64)
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        filled = np.full(self.context, segments[-1], dtype=np.int64)
        input_ids[:count], labels[:count], filled[:count] = run[:-1], run[1:], segments[:-1]
        labels[:count][~learned[1:]] = IGNORED
        if self.store.manifest.get("unfinished"):
            labels[:count][(np.diff(segments) != 0) & (run[:-1] != self.end)] = IGNORED
        return Row(input_ids, labels, filled - filled[0])

    def _run(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of the run, whether each is learned, and the index of its document."""
        first = int(np.searchsorted(self.borders, start, side="right")) - 1
        last = int(np.searchsorted(self.borders, stop, side="left"))
        pieces, learned, segments = [], [], []
        for index in range(first, last):
            offset = self.store.offsets[self.documents[index]] - self.borders[index]
            low, high = max(start, self.borders[index]), min(stop, self.borders[index + 1])
            pieces.append(self.store.tokens[offset + low : offset + high])
            learned.append(self.learned(offset + low, offset + high))
            segments.append(np.full(high - low, index))
        return np.concatenate(pieces).astype(np.int64), np.concatenate(learned), np.concatenate(segments)

    def learned(self, start: int, stop: int) -> np.ndarray:
        """Which of the store's tokens `start` to `stop` are learned."""
        mask = self.store.loss
        return np.ones(stop - start, dtype=bool) if mask is None else np.asarray(mask[start:stop], dtype=bool)


def split(hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the held-out documents, by content hash alone.

    A document is held out iff its hash, read as a fraction of 2^64, lies below `fraction`: duplicates cannot straddle
    the border, and a growing corpus keeps its split. A small corpus in which no hash lies there holds out its lowest.
    """
    unique = np.unique(hashes)
    if len(unique) < 2:
        raise Refusal(
            f"the corpus has {len(unique)} different document; a held-out split needs at least 2: give more documents "
            "or a data.heldout.path"
        )
    limit = np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    limit = min(max(limit, unique[0] + np.uint64(1)), unique[-1])
    held = hashes < limit
    return np.flatnonzero(~held), np.flatnonzero(held)


def without(hashes: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Indices of the documents whose content is not among the `held_out` hashes."""
    return np.flatnonzero(~np.isin(hashes, held_out))
