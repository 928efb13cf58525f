"""Which documents share a run of words with an evaluation set: exact, in memory bounded by the evaluation sets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailkd.data.corpus import Source
from tailkd.data.files import BadRecords
from tailkd.errors import Refusal

_WORD, _FACTOR = re.compile(r"\w+"), np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """Every run of `words` words of the texts of some evaluation sets.

    Words are runs of letters, digits and underscores, in lower case: punctuation and spacing do not tell texts apart.

    made_of: the sets by content. items: texts in them; short: those with fewer words than a run, which are not found.
    """

    words: int
    made_of: dict[str, Any]
    items: int
    short: int
    _vocabulary: dict[str, int]
    _runs: frozenset[bytes]
    _hashes: np.ndarray

    @staticmethod
    def of(sets: list[Source], words: int) -> Overlap:
        """Raises: Refusal where no text of the sets has as many words."""
        vocabulary: dict[str, int] = {}
        runs: set[bytes] = set()
        items = short = 0
        for one in sets:
            for document in one.documents(BadRecords()):
                ids = np.asarray([vocabulary.setdefault(w, len(vocabulary) + 1) for w in _split(document.text)], "u4")
                runs.update(ids[i : i + words].tobytes() for i in range(len(ids) - words + 1))
                items, short = items + 1, short + (len(ids) < words)
        if not runs:
            named = ", ".join(str(one.path or one.hub) for one in sets)
            raise Refusal(
                f"data.overlap: none of the {items:,} texts of {named} has {words} words, so nothing could be found; "
                "name the field that holds the question (text), or take fewer words"
            )
        hashes = np.unique(_hashed(np.frombuffer(b"".join(runs), "u4").reshape(-1, words)))
        made_of = {"words": words, "sets": [one.fingerprint() for one in sets]}
        return Overlap(words, made_of, items, short, vocabulary, frozenset(runs), hashes)

    def found(self, text: str) -> bool:
        """Whether the text shares a run of words with any of the sets."""
        get = self._vocabulary.get
        ids = np.asarray([get(word, 0) for word in _split(text)], "u4")
        if len(ids) < self.words:
            return False
        known = np.concatenate([[0], np.cumsum(ids != 0)])
        starts = np.flatnonzero(known[self.words :] - known[: -self.words] == self.words)
        if not len(starts):
            return False
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.words)[starts]
        likely = np.isin(_hashed(windows), self._hashes)
        return any(window.tobytes() in self._runs for window in windows[likely])


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hashed(windows: np.ndarray) -> np.ndarray:
    """uint64 (rows,): a hash of each row of ids, to spare most rows the exact comparison."""
    with np.errstate(over="ignore"):
        hashes = np.zeros(len(windows), dtype=np.uint64)
        for column in windows.T:
            hashes = hashes * _FACTOR + column
        return hashes
