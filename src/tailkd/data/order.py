"""Permutations and seeds that are pure functions of a number: nothing is drawn, so nothing has to be remembered."""

from __future__ import annotations

import numpy as np

_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mixed(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of each value under a key."""
    with np.errstate(over="ignore"):
        x = (values ^ np.uint64(key & (2**64 - 1))) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        return x ^ (x >> np.uint64(31))


def permuted(index: int, size: int, key: int) -> int:
    """Where a fixed permutation of range(size) sends `index`: four Feistel rounds, walked until inside the range."""
    half = max(1, -(-max(size - 1, 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(4):
            mixed = int(_mixed(np.asarray([right], dtype=np.uint64), key * 4 + number)[0])
            left, right = right, left ^ (mixed & mask)
        index = (left << half) | right
        if index < size:
            return index


def mixed_seed(seed: int, *numbers: int) -> int:
    """A seed from a seed and where it is used: (seed, step, rank)."""
    for number in numbers:
        seed = int(_mixed(np.asarray([number], dtype=np.uint64), seed)[0])
    return seed >> 1


def row_of(sample: int, rows: int, seed: int) -> int:
    """The row that global sample number `sample` shows: every epoch is another permutation of all rows."""
    epoch, position = divmod(sample, rows)
    return permuted(position, rows, int(_mixed(np.asarray([seed], dtype=np.uint64), epoch)[0]))
