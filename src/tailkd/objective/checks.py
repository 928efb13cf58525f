"""What the objective refuses, and the words it refuses with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tailkd.objective.settings import Objective
    from tailkd.objective.signal import Cached

FROM_CACHE = ("tail_aware", "forward_kl", "ghost_token_kl")  # what draws from the tail hold enough for


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} is {value!r}; expected a number >= {least}")


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a number between {low} and {high}")


def positive(name: str, value: float) -> None:
    if not (value > 0 and value != float("inf")):
        raise ValueError(f"{name} is {value!r}; expected a finite number > 0")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def logits_and_mask(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """The mask to use, after the shapes and the temperature were found in order."""
    if student_logits.dim() != 3 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}; expected "
            "one shape (batch, sequence, vocabulary); slice padded vocabulary rows off both sides first"
        )
    positive("temperature", temperature)
    if mask is None:
        return torch.ones(student_logits.shape[:2], dtype=torch.bool, device=student_logits.device)
    if mask.shape != student_logits.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)}; expected (batch, sequence) = {tuple(student_logits.shape[:2])}")
    return mask.bool()


def labels(labels: Tensor, shape: Sequence[int], vocabulary_size: int) -> None:
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels {tuple(labels.shape)}; expected (batch, sequence) = {tuple(shape)}")
    if labels.device.type != "cpu":  # looking inside would stop the host until the device is done
        return
    wrong = (labels != -100) & ((labels < 0) | (labels >= vocabulary_size))
    if wrong.any():
        raise ValueError(
            f"label {int(labels[wrong][0])} is outside the {vocabulary_size:,} vocabulary rows; expected 0 to "
            f"{vocabulary_size - 1:,}, or -100 for a position that does not count"
        )


def cached(cached: Cached, objective: Objective, labels: Tensor) -> None:
    """Whether a teacher that was written down holds what an objective needs."""
    kept = f"a cached teacher holds {cached.top_k} ids and {cached.draws} draws from the rest"
    if objective.divergence not in FROM_CACHE:
        raise ValueError(
            f"divergence {objective.divergence!r} needs the teacher's probability of every id, and {kept}; expected "
            f"one of {', '.join(FROM_CACHE)}, or a teacher as a Head"
        )
    if objective.temperature != cached.temperature:
        raise ValueError(
            f"temperature is {objective.temperature!r}, and the teacher was cached at {cached.temperature!r}, which "
            "nothing can undo; take that one, or cache the teacher anew at yours"
        )
    if objective.divergence != "forward_kl" and cached.top_k < min(objective.top_k, cached.vocabulary_size):
        raise ValueError(
            f"top_k is {objective.top_k}, and {kept}; expected at most {cached.top_k}: take such a top_k, or cache the "
            f"teacher anew with top_k {objective.top_k}"
        )
    if cached.log_tail_mass.shape != labels.shape:
        raise ValueError(
            f"a cached teacher of {tuple(cached.log_tail_mass.shape)} positions; expected (batch, sequence) = "
            f"{tuple(labels.shape)}, those of the labels"
        )
    if labels.device.type != "cpu":  # looking inside would stop the host until the device is done
        return
    for ids in (cached.head_ids, cached.tail_ids):
        outside = ((ids < 0) | (ids >= cached.vocabulary_size)) & (labels != -100).unsqueeze(-1)
        if outside.any():
            raise ValueError(
                f"cached id {int(ids[outside][0])} is outside the {cached.vocabulary_size:,} vocabulary rows; the "
                "cache is of another vocabulary, or damaged: cache the teacher anew"
            )
