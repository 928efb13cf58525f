"""One optimizer step: micro-batches, one division by the global count, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tailkd.data.batches import Batch
from tailkd.models.head import SplitModel
from tailkd.objective import Head, Objective, Tally, distillation_loss
from tailkd.objective.layout import with_sequences
from tailkd.objective.tally import add

Teacher = Callable[[Batch], Head]


@dataclass(frozen=True)
class StepResult:
    """parts: summed loss parts (nats). gradient_norm: before clipping. tokens: valid positions of the global batch."""

    parts: dict[str, Tally]
    gradient_norm: float
    tokens: int


def accumulate_gradients(
    student: SplitModel,
    teacher: Teacher | None,
    batch: Batch,
    *,
    objective: Objective,
    micro_batch_size: int,
) -> dict[str, Tally]:
    """Add the gradient of the batch's mean loss to the student's parameters; the micro-batch does not change it.

    Equals ``distillation_loss(student(batch), teacher(batch), batch.labels, objective=objective).mean().backward()``.
    """
    parts: dict[str, Tally] = {}
    for micro in batch.micro_batches(micro_batch_size):
        micro = micro.to(student.device)
        signal = teacher(micro) if teacher is not None and objective.needs_teacher else None
        layout = with_sequences(micro.valid, micro.row_borders, micro.labels.shape[1], None)
        loss = distillation_loss(student(micro.input_ids), signal, micro.labels, objective=objective, layout=layout)
        loss.mean(batch.count).backward()
        parts = add(parts, loss.parts)
    return parts


def train_step(
    student: SplitModel,
    teacher: Teacher | None,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    clip_norm: float,
) -> StepResult:
    """One update of the student on one global batch."""
    optimizer.zero_grad(set_to_none=True)
    parts = accumulate_gradients(student, teacher, batch, objective=objective, micro_batch_size=micro_batch_size)
    trained = [p for p in student.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    return StepResult(parts, float(norm), batch.count)
