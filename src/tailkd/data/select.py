"""What is trained on of what there is: arithmetic on scores of rows (MiniPLM) and of tokens (Rho-1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import xxhash
from torch import Tensor

from tailkd.data.packing import Row, Rows
from tailkd.errors import Refusal


def difference(teacher: np.ndarray, reference: np.ndarray, ratio: float) -> np.ndarray:
    """Indices, in corpus order, of the rows that the teacher finds most likely compared with the reference.

    Equals ``sorted(sorted(range(n), key=lambda i: teacher[i] - reference[i])[: int(ratio * n)])``: the share with the
    largest ``reference - teacher``, of equal ones the earlier.

    Args:
        teacher, reference: mean negative log-likelihood of each row under both, in one unit.
        ratio: share that is kept, in (0, 1].

    Raises:
        Refusal: scores of different lengths or not finite; a share of no row.

    Source: MiniPLM, difference sampling (`compute_difference_scores.py`, `construct_pretrain_data.py`).
    """
    if teacher.shape != reference.shape:
        raise Refusal(
            f"scores of {len(teacher):,} rows by the teacher and of {len(reference):,} by the reference; expected two "
            "scorings of the same rows"
        )
    differences = reference.astype(np.float64) - teacher.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(differences))
    if len(bad):
        raise Refusal(
            f"the scores of {len(bad):,} rows are not finite, the first of row {bad[0]:,}; score again in another "
            "training.precision, or look at that row's text"
        )
    count = int(ratio * len(differences))
    if count < 1:
        raise Refusal(
            f"data.select.ratio {ratio:g} of {len(differences):,} rows keeps none; give a larger ratio, more text, or "
            "a smaller data.context"
        )
    return np.sort(np.argsort(-differences, kind="stable")[:count])


def share_of(positions: int, ratio: float) -> int:
    """How many of a row's valid positions are learned: ``int(ratio * positions)``, but one where there is any."""
    return min(positions, max(1, int(ratio * positions)))


def excess_weights(losses: Tensor, reference: Tensor, row_borders: Sequence[int], ratio: float) -> Tensor:
    """1 for each row's share of positions with the largest ``losses - reference``, else 0; of equal ones the earlier.

    Args:
        losses, reference: (n,), cross-entropies of student and reference at the valid positions.
        row_borders: where each row begins among them, and the end.

    Source: Rho-1, there by batch; by row the micro-batch and the number of processes change nothing.
    """
    excess = losses.detach() - reference
    weights = torch.zeros_like(excess)
    for begin, end in pairwise(row_borders):
        order = torch.argsort(excess[begin:end], descending=True, stable=True)
        weights[begin + order[: share_of(end - begin, ratio)]] = 1.0
    return weights


class _View(Rows):
    """Rows seen through a choice: what is not said otherwise is that of the rows themselves."""

    def __init__(self, rows: Rows) -> None:
        vars(self).update(vars(rows))
        self.rows = rows

    def __getitem__(self, row: int) -> Row:
        return self.rows[row]


class Kept(_View):
    """The rows with the numbers `kept`, in their order; only the last row of a corpus may not be full."""

    def __init__(self, rows: Rows, kept: np.ndarray) -> None:
        super().__init__(rows)
        self.kept, self.choice = kept, xxhash.xxh3_128_hexdigest(kept.tobytes())
        missing = len(rows) * rows.context - rows.predicted if len(rows) - 1 in kept else 0
        self.predicted = self.tokens = len(kept) * rows.context - missing

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, row: int) -> Row:
        return self.rows[int(self.kept[row])]


class WithReference(_View):
    """The rows with a reference model's `losses` (rows, context), and the share of positions to learn.

    choice: fingerprint of the losses.
    """

    def __init__(self, rows: Rows, losses: np.ndarray, learned: float, *, choice: str = "") -> None:
        super().__init__(rows)
        self.losses, self.share, self.choice = losses, learned, choice

    def __getitem__(self, row: int) -> Row:
        return replace(self.rows[row], reference=np.array(self.losses[row]), learned=self.share)
