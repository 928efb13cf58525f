"""What one block of rows costs and which gradient it leaves: the mathematics of the chunked loss, in place.

A block is two buffers of logits (rows, vocabulary) in float32 or float64. Each function consumes them, returns values
per row, and leaves the gradient with respect to the student's logits in the student's buffer. Derivations are in
docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = math.log(0.5)
LOW = -1e30  # stands for -inf where a difference of two of them must stay a number


@dataclass(slots=True)
class Weights:
    """Weights per row, (rows, 1) each, of a block of the split family.

    Where `tail` is None it is not known yet: the student's buffer keeps the gradient without the tail term and the
    teacher's buffer ``tail_scale * (q~ - p~)``, to be added with the weight that is missing.
    """

    clm: Tensor
    head: Tensor
    tail_scale: Tensor
    tail: Tensor | None


@dataclass(slots=True)
class Split:
    """Values of a block of the split family (nats, per row)."""

    shift: Tensor  # the student's largest logit
    log_sum: Tensor  # logsumexp of the student's logits, less the shift
    head_kl: Tensor
    tail_kl: Tensor
    log_tail_mass: Tensor


def split_block(
    student: Tensor,
    teacher: Tensor,
    scratch: Tensor,
    head_ids: Tensor | None,
    top_k: int,
    weights: Weights,
) -> Split:
    """KL split at the ids of a head: forward KL (no head), ghost token and TAD (top-k), decoupled KD (the label).

    With q~, p~ the renormalised tails, a the tail masses, the loss is ``w_head * head_kl + w_tail * tail_kl`` and its
    gradient ``w_head * (q - p)`` in the head, ``w_head * q~ * (a_S - a_T) + w_tail * (q~ - p~)`` in the tail, plus
    ``w_clm * q`` everywhere.

    Args:
        head_ids: (rows, k) or None for the `top_k` largest of the teacher; no head where top_k is 0.
    """
    wide = student.dtype
    teacher_head, largest_t, head_ids = _head(teacher, head_ids, top_k)
    student_head = None
    if head_ids is not None:
        student_head = student.gather(1, head_ids)
        student.scatter_(1, head_ids, LOW)
    largest_s = student.amax(1, keepdim=True)
    student.sub_(largest_s)
    teacher.sub_(largest_t)
    torch.sub(teacher, student, out=scratch)
    teacher.exp_()
    student.exp_()
    # Scalars of a row are float64: their errors would be shared by all its entries.
    sum_t, sum_s = teacher.sum(1, keepdim=True).double(), student.sum(1, keepdim=True).double()
    dot = scratch.mul_(teacher).sum(1, keepdim=True)
    tail_kl = dot / sum_t - sum_t.log() + sum_s.log()
    if student_head is None or teacher_head is None:
        shift, log_sum_s = largest_s, sum_s.log()
        log_p = log_q = log_mass_t = log_mass_s = head_kl = gained = torch.zeros_like(tail_kl)
    else:
        shift, log_sum_s, log_q, log_mass_s = _head_and_tail(student_head, largest_s, sum_s)
        _, _, log_p, log_mass_t = _head_and_tail(teacher_head, largest_t, sum_t)
        head_kl = (log_p.exp() * (log_p - log_q)).sum(1, keepdim=True)
        head_kl = head_kl + log_mass_t.exp() * (log_mass_t - log_mass_s)
        # What the tail gained is what the head lost: the difference of the smaller masses keeps its digits.
        lost = log_p.exp().sum(1, keepdim=True) - log_q.exp().sum(1, keepdim=True)
        gained = torch.where(log_mass_t > HALF, lost, log_mass_s.exp() - log_mass_t.exp())
    base = (weights.clm * log_mass_s.exp() + weights.head * gained) / sum_s
    if weights.tail is None:
        teacher.mul_((-weights.tail_scale / sum_t).to(wide)).addcmul_(student, (weights.tail_scale / sum_s).to(wide))
        student.mul_(base.to(wide))
    else:
        student.mul_((base + weights.tail / sum_s).to(wide))
        student.addcmul_(teacher, (-weights.tail / sum_t).to(wide))
    if head_ids is not None:
        in_head = (weights.clm + weights.head) * log_q.exp() - weights.head * log_p.exp()
        student.scatter_(1, head_ids, in_head.to(wide))
        if weights.tail is None:
            teacher.scatter_(1, head_ids, 0.0)
    return Split(shift, log_sum_s, head_kl, tail_kl, log_mass_t)


def _head_and_tail(head: Tensor, largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shift, logsumexp less the shift, log-probabilities of the head, log tail mass.

    From the head's logits and, of the tail, its largest logit and the sum of exponentials relative to that. The shift
    is the largest logit of all: what is left is of the size of log V, however large the logits are.
    """
    shift = torch.maximum(largest, head.amax(1, keepdim=True))
    head, tail = (head - shift).double(), (largest - shift).double() + total.double().log()
    log_sum = torch.logaddexp(tail, head.logsumexp(1, keepdim=True))
    return shift, log_sum, head - log_sum, tail - log_sum


def log_tail_mass(teacher: Tensor, top_k: int) -> Tensor:
    """Log mass outside the `top_k` largest, (rows, 1); consumes the buffer."""
    head, largest, ids = _head(teacher, None, top_k)
    if head is None or ids is None:
        return torch.zeros_like(largest)
    total = teacher.sub_(largest).exp_().sum(1, keepdim=True)
    return _head_and_tail(head, largest, total)[3]


def _head(teacher: Tensor, ids: Tensor | None, top_k: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Head values of the teacher, the largest value outside, head ids; the head is LOW in the buffer afterwards."""
    values = None
    if ids is not None:
        values = teacher.gather(1, ids)
    elif top_k:
        values, ids = teacher.topk(top_k, dim=1)  # not top_k + 1: ties are broken as the oracle's torch.topk does
    if ids is not None:
        teacher.scatter_(1, ids, LOW)
    return values, teacher.amax(1, keepdim=True), ids


# ----- divergences that do not split: value and d value / d q, from log-probabilities


Whole = tuple[Tensor, Tensor]


def reverse_kl(log_q: Tensor, log_p: Tensor, setting: float) -> Whole:
    slope = log_q - log_p
    return (log_q.exp() * slope).sum(1, keepdim=True), slope


def jensen_shannon(log_q: Tensor, log_p: Tensor, setting: float) -> Whole:
    ratio = log_p - log_q
    q_over_m = -_log_mixture(ratio, setting)
    value = setting * (log_p.exp() * (ratio + q_over_m)).sum(1, keepdim=True)
    slope = q_over_m.mul_(1 - setting)
    return value + (log_q.exp() * slope).sum(1, keepdim=True), slope


def skew_forward_kl(log_q: Tensor, log_p: Tensor, setting: float) -> Whole:
    p_over_m = -_log_mixture(log_q - log_p, 1 - setting)
    return (log_p.exp() * p_over_m).sum(1, keepdim=True), -(1 - setting) * p_over_m.exp()


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, setting: float) -> Whole:
    q_over_m = -_log_mixture(log_p - log_q, 1 - setting)
    return (log_q.exp() * q_over_m).sum(1, keepdim=True), q_over_m - setting * q_over_m.exp()


def total_variation(log_q: Tensor, log_p: Tensor, setting: float) -> Whole:
    difference = log_q.exp() - log_p.exp()
    return 0.5 * difference.abs().sum(1, keepdim=True), 0.5 * difference.sign()


WHOLE = {
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def whole_block(
    student: Tensor,
    teacher: Tensor,
    of: Callable[[Tensor, Tensor, float], Whole],
    setting: float,
    weights: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of a divergence, largest logit of the student and its logsumexp less that, (rows, 1) each.

    Leaves ``w_clm * q + weight * gradient`` in `student`, for weights (w_clm, weight) of (rows, 1) each. The
    chain through the softmax is ``q * (slope - (q * slope).sum())`` for ``slope = d value / d q``.
    """
    shift = student.amax(1, keepdim=True)
    log_sum = _log_sum(student.sub_(shift))
    teacher.sub_(teacher.amax(1, keepdim=True))
    log_q, log_p = student.sub_(log_sum), teacher.sub_(_log_sum(teacher))
    value, slope = of(log_q, log_p, setting)
    q = log_q.exp()
    # Relative to the likeliest id first: where q is nearly one-hot the difference below would cancel.
    slope = slope.sub_(slope.gather(1, q.argmax(1, keepdim=True)))
    slope = slope.sub_((q * slope).sum(1, keepdim=True)).mul_(weights[1])
    torch.mul(q, slope.add_(weights[0]), out=student)
    return value, shift, log_sum


def _log_sum(shifted: Tensor) -> Tensor:
    """logsumexp of rows whose largest entry is 0, (rows, 1) in float64: its error is shared by the whole row."""
    return shifted.exp().sum(1, keepdim=True, dtype=torch.float64).log()


def clm_block(student: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and logsumexp less that, (rows, 1) each; leaves ``weight * softmax`` in `student`.

    The caller subtracts the weight at the label.
    """
    largest = student.amax(1, keepdim=True)
    total = student.sub_(largest).exp_().sum(1, keepdim=True)
    student.mul_(weight / total)
    return largest, total.log()


def _log_mixture(ratio: Tensor, share: float) -> Tensor:
    """``log(share * e^ratio + 1 - share)``: a mixture relative to one of its parts, so that nothing large cancels."""
    logs = torch.tensor([share, 1 - share], dtype=torch.float64).log().tolist()
    return torch.logaddexp(ratio + logs[0], torch.full_like(ratio, logs[1]))
