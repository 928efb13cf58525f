"""The loss against a teacher that was written down: its few numbers of a row, in float64. Derived in docs/numerics.md.

The student's logits of a block are read twice, outside the cached ids: for their sum and for their gradient. Everything
else happens at the cached ids, a few dozen a row. The blocks of a CPU and the kernels of a GPU take it here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailkd.objective.blocks import LOW, Split
from tailkd.objective.rows import HALF, Lumped, Tail, Weights
from tailkd.objective.signal import Cached


@dataclass(frozen=True, slots=True)
class CachedSide:
    """A cached teacher with the valid positions packed, split after its first `kept` ids (none: forward KL).

    What else was cached joins the tail, each id with its exact share, the draws with what is left.
    """

    head_ids: Tensor  # (n, K)
    tail_ids: Tensor  # (n, draws)
    log: Tensor  # (n, K + 1), float64: log-probabilities of the head's ids and of the rest
    rest_entropy: Tensor  # (n, 1), float64
    log_tail_mass: Tensor  # (n, 1), float64: of everything after the first `kept`
    kept: int

    @staticmethod
    def of(cached: Cached, valid: Tensor, kept: int) -> CachedSide:
        packed = {name: t.detach().flatten(0, 1).index_select(0, valid) for name, t in cached.tensors.items()}
        rest = packed["log_tail_mass"].unsqueeze(1)
        log = torch.cat([packed["head_log_probabilities"], rest], 1).double().clamp_(min=LOW)
        return CachedSide(
            head_ids=packed["head_ids"].long(),
            tail_ids=packed["tail_ids"].long(),
            log=log,
            rest_entropy=packed["tail_entropy"].double().unsqueeze(1),
            log_tail_mass=log[:, kept:].logsumexp(1, keepdim=True),
            kept=kept,
        )


@dataclass(slots=True)
class Found:
    """Values of some rows, and the gradient with respect to their logits.

    on_rest: times the renormalised student, outside the cached ids. at_head, at_draws: at these.
    """

    values: Split
    on_rest: Tensor
    at_head: Tensor
    at_draws: Tensor


def estimate(
    side: CachedSide, place: slice, logits: tuple[Tensor, Tensor], rest: Tail, labels: Tensor, weights: Weights
) -> Found:
    """``w_head * head_kl + w_tail * tail_kl + w_clm * cross-entropy``, the tail's KL estimated from the draws.

    Args:
        logits: of the student at the head's ids and at the draws, (rows, K) and (rows, draws).
        rest: of the student's other logits (the draws are among them).
        weights: with `tail` known.
    """
    assert weights.tail is not None
    kept, p, log_a = side.kept, side.log[place], side.log_tail_mass[place]
    q, drawn = Lumped.of(logits[0], rest), logits[1].double()
    log_rest = rest.largest.double() + rest.total.double().log()
    log_b = q.log[:, kept:].logsumexp(1, keepdim=True)
    # The kept ids and all the rest as one; then the rest, of which the other cached ids are known.
    gap, gap_of_masses = p - q.log, log_a - log_b
    head_kl = (p.exp() * gap)[:, :kept].sum(1, keepdim=True) + log_a.exp() * gap_of_masses
    shares, ours = (p[:, kept:] - log_a).exp(), (q.log[:, kept:] - log_b).exp()
    rest_kl = log_rest - drawn.mean(1, keepdim=True) - side.rest_entropy[place]
    tail_kl = (shares * (gap[:, kept:] - gap_of_masses)).sum(1, keepdim=True) + shares[:, -1:] * rest_kl

    gained = q.log.exp() - p.exp()
    # What the tail gained is what the head lost: the difference of the smaller masses keeps its digits.
    lost, won = -gained[:, :kept].sum(1, keepdim=True), gained[:, kept:].sum(1, keepdim=True)
    of_tail = weights.head * torch.where(log_a > HALF, lost, won) + weights.tail
    in_tail = of_tail * ours + weights.clm * q.log[:, kept:].exp()
    at_kept = weights.clm * q.log[:, :kept].exp() + weights.head * gained[:, :kept]
    at_head = torch.cat([at_kept, (in_tail - weights.tail * shares)[:, :-1]], 1)
    at_head -= weights.clm * (side.head_ids[place] == labels)
    on_rest, ids = in_tail[:, -1:], side.tail_ids[place]
    repeats = (ids.unsqueeze(2) == ids.unsqueeze(1)).sum(2).double() / ids.shape[1]
    at_draws = on_rest * (drawn - log_rest).clamp_(max=0.0).exp() - weights.tail * shares[:, -1:] * repeats
    at_draws -= weights.clm * (ids == labels)
    return Found(Split(q.log_sum_exp, head_kl, tail_kl, log_a), on_rest, at_head, at_draws)


def cached_block(student: Tensor, side: CachedSide, place: slice, labels: Tensor, weights: Weights) -> Split:
    """Values of a block of logits in the wide dtype, whose gradient is left in their place."""
    head_ids, tail_ids = side.head_ids[place], side.tail_ids[place]
    logits = student.gather(1, head_ids), student.gather(1, tail_ids)
    student.scatter_(1, head_ids, LOW)
    largest = student.amax(1, keepdim=True)
    total = student.sub_(largest).exp_().sum(1, keepdim=True)
    found = estimate(side, place, logits, Tail(largest, total), labels, weights)
    student.mul_((found.on_rest / total).to(student.dtype))
    student.scatter_add_(1, labels, -weights.clm)
    leave(student, side, place, found)
    return found.values


def leave(gradient: Tensor, side: CachedSide, place: slice, found: Found) -> None:
    """Write the gradient at the cached ids: the head's last, for where nothing is left to draw, any id was."""
    gradient.scatter_(1, side.tail_ids[place], found.at_draws.to(gradient.dtype))
    gradient.scatter_(1, side.head_ids[place], found.at_head.to(gradient.dtype))
