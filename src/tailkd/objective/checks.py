"""What the objective refuses, and the words it refuses with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
