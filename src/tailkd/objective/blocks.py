"""What one block of rows costs and which gradient it leaves: the mathematics of the chunked loss, in place.

A block is two buffers of logits (rows, vocabulary) in float32 or float64. Each function consumes them, returns values
per row, and leaves the gradient with respect to the student's logits in the student's buffer. Derivations are in
docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailkd.objective import rows
from tailkd.objective.rows import Lumped, Tail, Weights

LOW = -1e30  # stands for -inf where a difference of two of them must stay a number
GROUP = 32  # ids of which one maximum is kept in the search for the largest


@dataclass(slots=True)
class Split:
    """Values of a block of the split family (nats, per row)."""

    log_sum_exp: Tensor  # of the student's logits
    head_kl: Tensor
    tail_kl: Tensor
    log_tail_mass: Tensor


@dataclass(slots=True)
class Read:
    """A block after one look: both sides split at a head, the exponentials of their tails left in the buffers."""

    head_ids: Tensor | None
    student: Lumped
    teacher: Lumped
    student_total: Tensor  # of the exponentials in the buffer, float64
    teacher_total: Tensor
    tail_kl: Tensor


def read(student: Tensor, teacher: Tensor, scratch: Tensor, head_ids: Tensor | None, top_k: int) -> Read:
    """Split both sides at `head_ids`, or at the `top_k` largest of the teacher; no head where that is 0."""
    teacher_head, head_ids = _take_head(teacher, head_ids, top_k)
    student_head, _ = _take_head(student, head_ids, 0)
    largest_s, largest_t = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
    student.sub_(largest_s)
    teacher.sub_(largest_t)
    torch.sub(teacher, student, out=scratch)
    teacher.exp_()
    student.exp_()
    total_s, total_t = student.sum(1, keepdim=True).double(), teacher.sum(1, keepdim=True).double()
    dot = scratch.mul_(teacher).sum(1, keepdim=True)
    tail_kl = dot / total_t - total_t.log() + total_s.log()
    q = Lumped.of(student_head, Tail(largest_s, total_s))
    p = Lumped.of(teacher_head, Tail(largest_t, total_t))
    return Read(head_ids, q, p, total_s, total_t, tail_kl)


def split_block(
    buffers: tuple[Tensor, Tensor, Tensor], labels: Tensor, head_ids: Tensor | None, top_k: int, weights: Weights
) -> Split:
    """KL split at a head: forward KL (no head), ghost token and TAD (top-k), decoupled KD (the label).

    With q~, p~ the renormalised tails, a the tail masses, the loss is ``w_head * head_kl + w_tail * tail_kl`` and its
    gradient ``w_head * (q - p)`` in the head, ``w_head * q~ * (a_S - a_T) + w_tail * (q~ - p~)`` in the tail, plus
    ``w_clm * q`` everywhere, minus w_clm at the label. Where w_tail is not known yet the teacher's buffer keeps
    ``scale * (q~ - p~)``, to be added with the weight that is missing. `buffers`: student, teacher, scratch.
    """
    student, teacher, scratch = buffers
    found, wide = read(student, teacher, scratch, head_ids, top_k), student.dtype
    p, q = found.teacher, found.student
    is_label = None if found.head_ids is None else found.head_ids == labels
    gradient = rows.gradient(p, q, weights, is_label)
    if weights.tail is None:
        teacher.mul_((-weights.scale / found.teacher_total).to(wide))
        teacher.addcmul_(student, (weights.scale / found.student_total).to(wide))
        student.mul_((gradient.on_tail / found.student_total).to(wide))
    elif found.head_ids is None:
        student.mul_(((gradient.on_tail + weights.tail) / found.student_total).to(wide))
        student.addcmul_(teacher, (-weights.tail / found.teacher_total).to(wide))
    else:  # q~ - p~ by itself: where the two are nearly one the sum above would drown the first part in its rounding
        torch.mul(student, (gradient.on_tail / found.student_total).to(wide), out=scratch)
        student.mul_((weights.tail / found.student_total).to(wide))
        student.addcmul_(teacher, (-weights.tail / found.teacher_total).to(wide)).add_(scratch)
    student.scatter_add_(1, labels, -weights.clm)
    if found.head_ids is not None:
        student.scatter_(1, found.head_ids, gradient.in_head.to(wide))
        if weights.tail is None:
            teacher.scatter_(1, found.head_ids, 0.0)
    return Split(q.log_sum_exp, rows.head_kl(p, q), found.tail_kl, p.log_mass)


def log_tail_mass(teacher: Tensor, top_k: int) -> Tensor:
    """Log mass outside the `top_k` largest, (rows, 1); consumes the buffer."""
    head, _ = _take_head(teacher, None, top_k)
    shift = teacher.amax(1, keepdim=True)
    return Lumped.of(head, Tail(shift, teacher.sub_(shift).exp_().sum(1, keepdim=True))).log_mass


def _take_head(logits: Tensor, ids: Tensor | None, top_k: int) -> tuple[Tensor | None, Tensor | None]:
    """The head's logits and its ids, (rows, k); in the buffer it is LOW afterwards."""
    if ids is None:
        if not top_k:
            return None, None
        values, ids = largest(logits, top_k)
    else:
        values = logits.gather(1, ids)
    logits.scatter_(1, ids, LOW)
    return values, ids


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count, dim=1)`` where no two are equal, from the maxima of groups: rows are long, heads short."""
    groups = logits.shape[1] // GROUP
    if groups < 8 * count:
        return logits.topk(count, dim=1)
    grouped = logits[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    best = grouped.amax(1).topk(count, dim=1).indices  # no other group holds one of them
    members = torch.arange(0, groups * GROUP, groups, device=logits.device)
    ids = (best.unsqueeze(2) + members).flatten(1)
    rest = torch.arange(groups * GROUP, logits.shape[1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([ids, rest], 1)
    values, places = logits.gather(1, ids).topk(count, dim=1)
    return values, ids.gather(1, places)


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
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Value of a divergence and logsumexp of the student's logits, (rows, 1) each.

    Leaves ``w_clm * q + weight * gradient``, minus w_clm at the label, in `student`, for weights (w_clm, weight) of
    (rows, 1) each. The chain through the softmax is ``q * (slope - (q * slope).sum())`` for ``slope = d value / d q``.
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
    student.scatter_add_(1, labels, -weights[0])
    return value, shift.double() + log_sum


def _log_sum(shifted: Tensor) -> Tensor:
    """logsumexp of rows whose largest entry is 0, (rows, 1) in float64: its error is shared by the whole row."""
    return shifted.exp().sum(1, keepdim=True, dtype=torch.float64).log()


def clm_block(student: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (rows, 1); leaves ``weight * (softmax - one_hot(labels))`` in `student`."""
    at_label, shift = student.gather(1, labels).double(), student.amax(1, keepdim=True)
    total = student.sub_(shift).exp_().sum(1, keepdim=True)
    student.mul_(weight / total)
    cross_entropy = shift.double() + total.double().log() - at_label
    student.scatter_(1, labels, (weight * torch.expm1(-cross_entropy)).to(student.dtype))  # 1 - q without cancelling
    return cross_entropy


def _log_mixture(ratio: Tensor, share: float) -> Tensor:
    """``log(share * e^ratio + 1 - share)``: a mixture relative to one of its parts, so that nothing large cancels."""
    logs = torch.tensor([share, 1 - share], dtype=torch.float64).log().tolist()
    return torch.logaddexp(ratio + logs[0], torch.full_like(ratio, logs[1]))
