"""The few numbers of a row: a head of ids and one entry for all the rest, in float64.

Their errors would be shared by a row's whole gradient. The blocks of a CPU and the kernels of a GPU take them here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = math.log(0.5)


@dataclass(slots=True)
class Tail:
    """Logits of rows outside a head, (rows, 1) each: the largest, and the sum of exponentials relative to it."""

    largest: Tensor
    total: Tensor


@dataclass(slots=True)
class Lumped:
    """Log-probabilities of the head's ids and of the rest, (rows, k + 1), and logsumexp of all logits, (rows, 1)."""

    log: Tensor
    log_sum_exp: Tensor

    @staticmethod
    def of(head: Tensor | None, tail: Tail) -> Lumped:
        rest = tail.largest.double() + tail.total.double().log()
        logits = rest if head is None else torch.cat([head.double(), rest], 1)
        log_sum_exp = logits.logsumexp(1, keepdim=True)
        return Lumped(logits - log_sum_exp, log_sum_exp)

    @property
    def log_mass(self) -> Tensor:
        """Log of the tail mass, (rows, 1)."""
        return self.log[:, -1:]


@dataclass(slots=True)
class Weights:
    """Weights per row, (rows, 1) each, of cross-entropy, head part and renormalised tail part.

    Where `tail` is None it is not known yet (it needs the mean tail mass of the sequence); `scale` is what it will be
    multiplied by.
    """

    clm: Tensor
    head: Tensor
    scale: Tensor
    tail: Tensor | None


@dataclass(slots=True)
class Gradient:
    """d loss / d logits but for ``w_tail * (q~ - p~)``: `on_tail` times q~ in the tail, `in_head` at the head's ids."""

    on_tail: Tensor
    in_head: Tensor


def head_kl(p: Lumped, q: Lumped) -> Tensor:
    """KL over the head's ids and the lumped rest, (rows, 1)."""
    return (p.log.exp() * (p.log - q.log)).sum(1, keepdim=True)


def gradient(p: Lumped, q: Lumped, weights: Weights, is_label: Tensor | None) -> Gradient:
    """``w_clm * (q - 1 at the label) + w_head * (q - p)`` at the head's ids and, lumped, in the tail.

    Args:
        is_label: (rows, k), where the head holds the label; None without a head.
    """
    gained = q.log.exp() - p.log.exp()
    # What the tail gained is what the head lost: the difference of the smaller masses keeps its digits.
    in_tail = torch.where(p.log_mass > HALF, -gained[:, :-1].sum(1, keepdim=True), gained[:, -1:])
    on_tail = weights.clm * q.log_mass.exp() + weights.head * in_tail
    if is_label is None:
        return Gradient(on_tail, gained[:, :-1])
    return Gradient(on_tail, weights.clm * (q.log[:, :-1].exp() - is_label.double()) + weights.head * gained[:, :-1])
