"""Every divergence straight from its formula: eager, any dtype up to float64, the oracle of the tests.

Each public function takes student and teacher logits of shape (batch, sequence, vocabulary) and returns nats per
position, shape (batch, sequence), 0 where masked. The gradient flows to the student alone. A temperature t softens
both sides and multiplies by t^2 (Hinton et al. 2015), so that gradients keep their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailkd.objective import checks
from tailkd.objective.signal import Cached

NEGATIVE_INFINITY = float("-inf")


# ----- the pieces every divergence is made of


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``(logits / temperature).log_softmax(-1)`` in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def log_sum_exp(values: Tensor) -> Tensor:
    """``torch.logsumexp(values, -1)``, with gradient 0 instead of NaN where every entry is -inf."""
    top = values.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    total = torch.exp(values - top).sum(-1)
    empty = total == 0
    result = torch.where(empty, torch.ones_like(total), total).log() + top.squeeze(-1)
    return result.masked_fill(empty, NEGATIVE_INFINITY)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p * (log_p - log_q)`` entry by entry, 0 where p is 0 (whatever q is there)."""
    absent = log_p.exp() == 0
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(absent, 0.0)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """``log(share * p + (1 - share) * q)`` in log space; -inf where both are absent."""
    absent = (log_p == NEGATIVE_INFINITY) & (log_q == NEGATIVE_INFINITY)
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    log_share = torch.tensor([share, 1.0 - share], dtype=log_p.dtype, device=log_p.device).log()
    return torch.logaddexp(log_p + log_share[0], log_q + log_share[1]).masked_fill(absent, NEGATIVE_INFINITY)


@dataclass(frozen=True, slots=True)
class Split:
    """KL of one position in two parts: ``head_kl + tail_mass * tail_kl == KL(p || q)`` exactly (Eq. 2).

    head_kl: the kept ids and one lumped entry for the rest (nats). tail_kl: the renormalised rest (nats).
    log_tail_mass: log of the mass of p on the rest; -inf where nothing is left.
    """

    head_kl: Tensor
    tail_kl: Tensor
    log_tail_mass: Tensor


def split_kl(log_p: Tensor, log_q: Tensor, head: Tensor) -> Split:
    """Split KL(p || q) at the ids that `head` (a boolean mask over the vocabulary) keeps."""
    log_mass_p = log_sum_exp(log_p.masked_fill(head, NEGATIVE_INFINITY))
    log_mass_q = log_sum_exp(log_q.masked_fill(head, NEGATIVE_INFINITY))
    lumped = kl_terms(log_mass_p, log_mass_q)
    kept = kl_terms(log_p, log_q).masked_fill(~head, 0.0).sum(-1)
    empty = log_mass_p == NEGATIVE_INFINITY
    tail_p = _renormalised(log_p, log_mass_p, head, empty)
    tail_q = _renormalised(log_q, log_mass_q, head, empty)
    return Split(kept + lumped, kl_terms(tail_p, tail_q).sum(-1), log_mass_p)


def _renormalised(log_p: Tensor, log_mass: Tensor, head: Tensor, empty: Tensor) -> Tensor:
    log_mass = log_mass.masked_fill(empty, 0.0).unsqueeze(-1)
    return (log_p - log_mass).masked_fill(head | empty.unsqueeze(-1), NEGATIVE_INFINITY)


def cached_split(log_q: Tensor, cached: Cached, mask: Tensor, top_k: int) -> Split:
    """KL(p || q) split at the first `top_k` ids of a teacher p that was written down; `tail_kl` is an estimate.

    With E its other kept ids, x the draws, H their entropy, a and b the masses of p and q after `top_k`, and
    ``share = tail mass / a``, the tail's KL is estimated by::

        (p[E] / a * log((p[E] / a) / (q[E] / b))).sum() + share * (log(share) - H - log(q[x] / b).mean())

    Its expectation over the draws is `split_kl`'s. Positions outside `mask` may hold anything, and come out finite.
    """
    wide, outside = log_q.dtype, ~mask
    ids, draws = (t.long().masked_fill(outside.unsqueeze(-1), 0) for t in (cached.head_ids, cached.tail_ids))
    log_p = cached.head_log_probabilities.masked_fill(outside.unsqueeze(-1), 0.0).to(wide)
    log_rest, entropy = (t.masked_fill(outside, 0.0).to(wide) for t in (cached.log_tail_mass, cached.tail_entropy))
    at_ids, at_draws = log_q.gather(-1, ids), log_q.gather(-1, draws)
    head = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, ids[..., :top_k], True)
    log_a = log_sum_exp(torch.cat([log_p[..., top_k:], log_rest.unsqueeze(-1)], -1))
    log_b = log_sum_exp(log_q.masked_fill(head, NEGATIVE_INFINITY))
    head_kl = kl_terms(log_p[..., :top_k], at_ids[..., :top_k]).sum(-1) + kl_terms(log_a, log_b)
    empty, nothing_drawn = log_a == NEGATIVE_INFINITY, log_rest == NEGATIVE_INFINITY
    norm_p, norm_q = (log_mass.masked_fill(empty, 0.0) for log_mass in (log_a, log_b))
    others = (one[..., top_k:] - norm.unsqueeze(-1) for one, norm in ((log_p, norm_p), (at_ids, norm_q)))
    log_share = (log_rest - norm_p).masked_fill(nothing_drawn, 0.0)
    at_draws = (at_draws - norm_q.unsqueeze(-1)).masked_fill(nothing_drawn.unsqueeze(-1), 0.0)
    of_draws = log_share.exp() * (log_share - entropy - at_draws.mean(-1))
    return Split(head_kl, kl_terms(*others).sum(-1) + of_draws.masked_fill(nothing_drawn, 0.0), log_a)


def top_k_mask(logits: Tensor, top_k: int) -> Tensor:
    """True at the ids of the `top_k` largest logits of each position (ties as `torch.topk` breaks them)."""
    ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)


def log_mean_tail_mass(log_tail_mass: Tensor, mask: Tensor, segments: Tensor | None) -> Tensor:
    """``log(mean of tail_mass over the valid positions of the sequence)``, at every position of that sequence.

    A sequence is a row, or with `segments` (batch, sequence) the positions of a row that carry one segment id.
    """
    log_tail_mass = log_tail_mass.detach().masked_fill(~mask, NEGATIVE_INFINITY)
    if segments is None:
        total, count = torch.logsumexp(log_tail_mass, -1, keepdim=True), mask.sum(-1, keepdim=True)
    else:
        same = segments.unsqueeze(-1) == segments.unsqueeze(-2)  # (batch, sequence, sequence)
        total = torch.logsumexp(log_tail_mass.unsqueeze(-2).masked_fill(~same, NEGATIVE_INFINITY), -1)
        count = (same & mask.unsqueeze(-2)).sum(-1)
    return (total - count.clamp_min(1).to(total.dtype).log()).expand_as(log_tail_mass)


def tail_weight(log_tail_mass: Tensor, log_mean: Tensor, beta: float, floor: float) -> Tensor:
    """``beta * tail_mass / max(mean tail mass, floor)`` in log space, 0 where the tail is empty (Eq. 3)."""
    if floor > 0:
        log_mean = log_mean.clamp_min(torch.tensor(floor, dtype=torch.float64).log().item())
    log_mean = log_mean.masked_fill(log_mean == NEGATIVE_INFINITY, 0.0)
    return beta * torch.exp(log_tail_mass - log_mean)


# ----- the divergences


def tail_aware_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    top_k: int = 10,
    beta: float = 2.0,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float = 1.0,
    tail_mass_floor: float = 1e-6,
) -> Tensor:
    """Tail-Aware Distillation, the divergence of Eq. 3, in nats per position (batch, sequence).

    Equals, with p the teacher, q the student, S the teacher's top_k ids and a = p[~S].sum() at each position::

        head = sum(p[S] * log(p[S] / q[S])) + a * log(a / (1 - q[S].sum()))
        tail = sum(p[~S] / a * log((p[~S] / a) / (q[~S] / q[~S].sum())))
        head + beta * a / a[valid positions of the sequence].mean() * tail

    Args:
        student_logits, teacher_logits: (batch, sequence, vocabulary), padded vocabulary rows already sliced off or -inf
            on both sides.
        top_k: ids in the head; from the vocabulary size on the divergence is the forward KL.
        beta: weight of the tail, averaged over each sequence. Plain KL is beta = mean tail mass, not beta = 1.
        mask: (batch, sequence), True where a position counts; None for all.
        segments: (batch, sequence) integers; the mean tail mass is taken per (row, segment) instead of per row.
        temperature: softens both sides, multiplies by temperature^2.
        tail_mass_floor: lower bound under the mean tail mass; 0 is the paper's formula, which has none.

    Raises:
        ValueError: shapes that differ, top_k < 1, beta < 0, temperature <= 0.

    Source: "Don't Ignore the Tail", Eq. 2 and 3.
    """
    mask = checks.logits_and_mask(student_logits, teacher_logits, mask, temperature)
    checks.at_least("top_k", top_k, 1)
    checks.at_least("beta", beta, 0.0)
    log_p, log_q = pair(student_logits, teacher_logits, temperature)
    split = split_kl(log_p, log_q, top_k_mask(teacher_logits, top_k))
    log_mean = log_mean_tail_mass(split.log_tail_mass, mask, segments)
    return tail_aware_values(split, log_mean, mask, beta=beta, floor=tail_mass_floor, temperature=temperature)


def tail_aware_values(
    split: Split, log_mean: Tensor, mask: Tensor, *, beta: float, floor: float, temperature: float
) -> Tensor:
    """Eq. 3 from a split at the top-k ids and the log mean tail mass of each position's sequence."""
    weight = tail_weight(split.log_tail_mass, log_mean, beta, floor)
    return _masked(split.head_kl + weight * split.tail_kl, mask, temperature)


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """``(p * (p / q).log()).sum(-1)``: KL(teacher || student), vanilla distillation (Eq. 1)."""
    return _simple(lambda log_p, log_q: kl_terms(log_p, log_q), student_logits, teacher_logits, mask, temperature)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """``(q * (q / p).log()).sum(-1)``: KL(student || teacher)."""
    return _simple(lambda log_p, log_q: kl_terms(log_q, log_p), student_logits, teacher_logits, mask, temperature)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    jsd_beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``b * KL(p || m) + (1 - b) * KL(q || m)`` with ``m = b * p + (1 - b) * q``; b = 0 is forward, b = 1 reverse KL.

    Source: generalised JSD of on-policy GKD (Agarwal et al. 2024), with its special cases at 0 and 1.
    """
    checks.within("jsd_beta", jsd_beta, 0.0, 1.0)
    if jsd_beta in (0.0, 1.0):
        one_sided = forward_kl if jsd_beta == 0.0 else reverse_kl
        return one_sided(student_logits, teacher_logits, mask=mask, temperature=temperature)

    def terms(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q, jsd_beta)
        return jsd_beta * kl_terms(log_p, log_m) + (1.0 - jsd_beta) * kl_terms(log_q, log_m)

    return _simple(terms, student_logits, teacher_logits, mask, temperature)


def skew_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``KL(p || skew * p + (1 - skew) * q)`` (DistiLLM, Ko et al. 2024)."""
    checks.within("skew", skew, 0.0, 1.0)
    return _simple(
        lambda log_p, log_q: kl_terms(log_p, log_mixture(log_p, log_q, skew)),
        student_logits,
        teacher_logits,
        mask,
        temperature,
    )


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``KL(q || (1 - skew) * p + skew * q)`` (DistiLLM, Ko et al. 2024)."""
    checks.within("skew", skew, 0.0, 1.0)
    return _simple(
        lambda log_p, log_q: kl_terms(log_q, log_mixture(log_q, log_p, skew)),
        student_logits,
        teacher_logits,
        mask,
        temperature,
    )


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """``0.5 * (p - q).abs().sum(-1)``: one minus what speculative decoding would accept (at temperature 1)."""
    return _simple(
        lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs(), student_logits, teacher_logits, mask, temperature
    )


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``dkd_alpha * TCKD + dkd_beta * NCKD``: KL split at the label instead of at the top-k ids.

    With y the label: TCKD is the KL of the pair (p[y], 1 - p[y]), NCKD that of the renormalised rest;
    ``TCKD + (1 - p[y]) * NCKD == KL``. Positions labelled -100 are masked.

    Source: decoupled knowledge distillation (Zhao et al. 2022), Eq. 7.
    """
    mask = checks.logits_and_mask(student_logits, teacher_logits, mask, temperature)
    checks.labels(labels, mask.shape, student_logits.shape[-1])
    mask = mask & (labels != -100)
    log_p, log_q = pair(student_logits, teacher_logits, temperature)
    target = labels.clamp_min(0).unsqueeze(-1)
    split = split_kl(log_p, log_q, torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, target, True))
    return _masked(dkd_alpha * split.head_kl + dkd_beta * split.tail_kl, mask, temperature)


def ghost_token_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    top_k: int = 10,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The head part alone: KL over the teacher's top_k ids and one ghost entry for all the rest (TAD at beta = 0)."""
    return tail_aware_divergence(
        student_logits, teacher_logits, top_k=top_k, beta=0.0, mask=mask, temperature=temperature
    )


def pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student, in this order and in one dtype."""
    log_q = log_probabilities(student_logits, temperature)
    return log_probabilities(teacher_logits.detach(), temperature).to(log_q.dtype), log_q


def _masked(values: Tensor, mask: Tensor, temperature: float) -> Tensor:
    return (values * temperature**2).masked_fill(~mask, 0.0)


def _simple(
    terms: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
) -> Tensor:
    mask = checks.logits_and_mask(student_logits, teacher_logits, mask, temperature)
    return _masked(terms(*pair(student_logits, teacher_logits, temperature)).sum(-1), mask, temperature)
