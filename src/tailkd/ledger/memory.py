"""Bytes of memory and of disk, by part, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tailkd.ledger.parameters import count, on_meta
from tailkd.ledger.rehearsal import Batch, Players, rehearse

MASTER = 4  # bytes of a float32 weight or gradient
PARTS = ("weights", "gradients", "optimizer", "activations", "objective", "teacher")


@dataclass(frozen=True)
class Teacher:
    """config: of transformers. dtype: of its weights, None for that of the products. signal: one of `flops.SIGNALS`.

    beside_cache: it is loaded for held-out evaluation, whatever training reads.
    """

    config: Any
    dtype: torch.dtype | None = None
    signal: str = "live"
    beside_cache: bool = False

    @property
    def loaded(self) -> bool:
        return self.beside_cache or self.signal in ("live", "none")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its worst moment (`total`), and of each part at its own.

    Parts do not all live at once (gradients come as activations go), so they add up to `total` or more. weights,
    gradients, optimizer: of the student in float32. activations: what a micro-batch's forward pass leaves for its
    backward pass, under autocast the low-precision copies of the weights too. objective: what the loss needs while it
    runs. teacher: all teachers' weights and hidden states; of one that training does not ask, the weights. moments:
    bytes by moment; `total` is the largest.
    """

    total: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    objective: int
    teacher: int
    moments: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("total", *PARTS, "moments")}


def memory(
    student: Any,
    teachers: Sequence[Teacher],
    batch: Batch,
    *,
    frozen_embeddings: bool = False,
    moment_bytes: int = 8,
) -> Memory:
    """Peak memory of training `student` (a transformers configuration) against `teachers` after the first step.

    Process and libraries themselves (and a GPU's context) come on top.

    Args:
        moment_bytes: of the optimizer's state per trained parameter; 8 for AdamW in float32, 2 in 8 bits.
    """
    loaded = [(t.config, t.dtype or batch.compute, t.signal) for t in teachers if t.loaded]
    live = tuple((config, dtype) for config, dtype, signal in loaded if signal == "live")
    peaks = rehearse(Players(student, live, frozen_embeddings), batch)
    found = count(student, frozen_embeddings=frozen_embeddings)
    weights, optimizer = MASTER * found.total, moment_bytes * found.trainable
    frozen_weights = sum(dtype.itemsize * count(config).total for config, dtype, _ in loaded)
    resting = weights + optimizer + frozen_weights
    moments = {
        "teacher_forward": resting + peaks.teacher_forward,
        "student_forward": resting + peaks.forward,
        "objective": resting + peaks.loss,
        "backward": resting + peaks.backward,
        "update": resting + peaks.left + _update(student, found.trainable, batch.device),
    }
    return Memory(
        total=max(moments.values()),
        weights=weights,
        gradients=MASTER * found.trainable,
        optimizer=optimizer,
        activations=peaks.kept,
        objective=peaks.objective,
        teacher=frozen_weights + peaks.signal,
        moments=moments,
    )


def _update(student: Any, trainable: int, device: str) -> int:
    """Temporaries of AdamW: two of the largest parameter on a CPU, a square root of all second moments on a GPU."""
    if device == "cuda":
        return MASTER * trainable
    return 2 * MASTER * max(parameter.numel() for parameter in on_meta(student).parameters())


def disk(total: int, trainable: int, *, keep_checkpoints: int, corpus_tokens: int, vocabulary: int) -> int:
    """Bytes on the disk at the fullest moment of a run.

    Equals ``(keep + 1) * (weights + two moments) + the student + prepared tokens``: a checkpoint is whole before an
    older one goes; weights and moments are float32, ids take two bytes where the vocabulary allows.
    """
    checkpoint = MASTER * (total + 2 * trainable)
    return (keep_checkpoints + 1) * checkpoint + MASTER * total + corpus_tokens * (2 if vocabulary <= 1 << 16 else 4)
