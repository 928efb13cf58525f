"""Student against teacher on held-out rows, as sums over tokens divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.evaluate.calibration import Ece, FullEce
from tailkd.models.head import SplitModel
from tailkd.objective import Head
from tailkd.objective.divergences import log_probabilities, split_kl, top_k_mask

TAIL_SIZES = (1, 5, 10, 20)
CHUNK_BYTES = 64 << 20  # of one side's float32 logits

Signal = Callable[[Batch], Head]


@dataclass(frozen=True)
class HeldOut:
    """measures: means over tokens. rows: sums per held-out row, for intervals. reliability: of the first choice."""

    measures: dict[str, Any]
    rows: dict[str, list[float]]
    reliability: list[list[float]]


@torch.no_grad()
def evaluate(
    student: SplitModel,
    teacher: Signal | None,
    batches: Iterable[Batch],
    *,
    top_k: int,
) -> HeldOut:
    """Measures of the student over every valid position of `batches`.

    Measures are nats per token (cross_entropy, kl = head_kl + tail_kl split at the teacher's `top_k` ids), fractions
    (full_ece, ece, top1_accuracy, top1_agreement, mismatch_rate = teacher's first choice is not the next token,
    acceptance = 1 - total variation) and tail_mass, the student's mass outside the teacher's K first ids. Without a
    teacher the measures that need one are None and tail_mass is outside the student's own. Give the teacher as both
    for its own measures.
    """
    full, top = FullEce(), Ece()
    rows: list[Tensor] = []  # (rows of a batch, names + 1): sums of the measures, and the number of tokens
    was_training = student.model.training
    student.model.eval()
    for batch in batches:
        batch = batch.to(student.device)
        student_head = student(batch.input_ids)
        teacher_head = teacher(batch) if teacher is not None else None
        sums = torch.zeros(len(batch), len(_NAMES) + 1, dtype=torch.float64)
        for positions in _chunks(batch, student_head.vocabulary_size):
            labels = batch.labels.flatten()[positions]
            log_q = _log_probabilities(student_head, positions)
            log_p = log_q if teacher_head is None else _log_probabilities(teacher_head, positions)
            sums.index_add_(0, positions.cpu() // batch.labels.shape[1], _columns(log_p, log_q, labels, top_k).cpu())
            probabilities = log_q.exp()
            full.update(probabilities, labels)
            top.update(probabilities, labels)
        rows.append(sums)
    student.model.train(was_training)
    table = torch.cat(rows)
    measures = _measures(table.sum(0), full.value(), top.value(), alone=teacher is None)
    per_row = {name: table[:, _NAMES.index(name)].tolist() for name in ROW_MEASURES if measures[name] is not None}
    return HeldOut(measures, {"tokens": table[:, -1].tolist(), **per_row}, top.reliability())


ROW_MEASURES = ("cross_entropy", "kl")
_TEACHER_NAMES = ("kl", "head_kl", "tail_kl", "top1_agreement", "mismatch_rate", "acceptance")
_NAMES = ("cross_entropy", "top1_accuracy", *_TEACHER_NAMES, *(f"tail_mass_{k}" for k in TAIL_SIZES))


def _columns(log_p: Tensor, log_q: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Each position's measures in the order of `_NAMES`, and a 1 to count it: float64 (positions, names + 1)."""
    split = split_kl(log_p, log_q, top_k_mask(log_p, top_k))
    tail_kl = split.log_tail_mass.exp() * split.tail_kl
    first_p, first_q = log_p.argmax(-1), log_q.argmax(-1)
    columns = [
        -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        first_q == labels,
        split.head_kl + tail_kl,
        split.head_kl,
        tail_kl,
        first_p == first_q,
        first_p != labels,
        torch.minimum(log_p.exp(), log_q.exp()).sum(-1),
        *_tail_masses(log_p, log_q),
        torch.ones_like(labels),
    ]
    return torch.stack([column.double() for column in columns], -1)


def _tail_masses(log_p: Tensor, log_q: Tensor) -> list[Tensor]:
    """Mass of q outside the first K ids of p, added up from the far tail inwards so that nothing cancels."""
    largest = min(max(TAIL_SIZES), log_p.shape[-1])
    order = log_p.topk(largest, dim=-1).indices
    rest = log_q.exp().scatter(-1, order, 0.0).sum(-1)
    kept = log_q.gather(-1, order).exp()
    return [rest + kept[:, k:].sum(-1) if k < log_p.shape[-1] else torch.zeros_like(rest) for k in TAIL_SIZES]


def _log_probabilities(head: Head, positions: Tensor) -> Tensor:
    hidden = head.hidden.flatten(0, 1)[positions].float()
    return log_probabilities(Head(hidden, head.weight.float(), _float(head.bias), head.scale, head.softcap).logits())


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _chunks(batch: Batch, vocabulary: int) -> tuple[Tensor, ...]:
    return batch.valid.to(batch.labels.device).split(max(1, CHUNK_BYTES // (4 * vocabulary)))


def _measures(sums: Tensor, full: float, ece: float, *, alone: bool) -> dict[str, Any]:
    tokens = int(sums[-1])
    values: dict[str, float | None] = dict(zip(_NAMES, (sums[:-1] / max(tokens, 1)).tolist(), strict=True))
    tail_mass = {str(k): values.pop(f"tail_mass_{k}") for k in TAIL_SIZES}
    if alone:
        values |= dict.fromkeys(_TEACHER_NAMES)
    return {"tokens": tokens, **values, "full_ece": full, "ece": ece, "tail_mass": tail_mass}
