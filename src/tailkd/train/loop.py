"""When to step, log, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tailkd.data.batches import Batches
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.optim import Schedule
from tailkd.train.step import StepResult, Teacher, train_step


@dataclass(frozen=True)
class Plan:
    """How long to train and what happens on the way; intervals in tokens, None for only at the end."""

    steps: int
    micro_batch_size: int
    clip_norm: float
    save_every_tokens: int | None
    evaluate_every_tokens: int | None


@dataclass(frozen=True)
class Hooks:
    """What the loop tells the run: a record of each step, an evaluation that is due, and how far the record file is."""

    record: Callable[[dict[str, Any]], None]
    evaluate: Callable[[int, int], Any]
    metrics_bytes: Callable[[], int]


def train(
    student: SplitModel,
    teacher: Teacher | None,
    batches: Batches,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    checkpoints: Checkpoints,
    plan: Plan,
    hooks: Hooks,
    cursor: Cursor,
) -> Cursor:
    """Train from `cursor` to the plan's last step; the last state is saved too."""
    while cursor.step < plan.steps:
        started = time.perf_counter()
        learning_rate = schedule(cursor.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        student.model.train()
        result = train_step(
            student,
            teacher,
            batches[cursor.step],
            objective=objective,
            optimizer=optimizer,
            micro_batch_size=plan.micro_batch_size,
            clip_norm=plan.clip_norm,
        )
        seconds = time.perf_counter() - started
        before = cursor.tokens
        cursor = Cursor(cursor.step + 1, before + result.tokens, cursor.seconds + seconds, cursor.metrics_bytes)
        hooks.record(_record(result, cursor, learning_rate, seconds))
        last = cursor.step == plan.steps
        if not last and _due(plan.evaluate_every_tokens, before, cursor.tokens):
            hooks.evaluate(cursor.step, cursor.tokens)
        if last or _due(plan.save_every_tokens, before, cursor.tokens):
            cursor = Cursor(cursor.step, cursor.tokens, cursor.seconds, hooks.metrics_bytes())
            checkpoints.save(student.model, optimizer, cursor)
    student.model.eval()
    return cursor


def _due(every: int | None, before: int, after: int) -> bool:
    return every is not None and before // every < after // every


def _record(result: StepResult, cursor: Cursor, learning_rate: float, seconds: float) -> dict[str, Any]:
    parts = {name: tally.mean() for name, tally in result.parts.items()}
    floored = result.parts.get("floored_rows")
    if floored is not None:
        parts["floored_rows"] = int(floored.sum)
    return {
        "kind": "step",
        "step": cursor.step,
        "tokens": cursor.tokens,
        **parts,
        "learning_rate": learning_rate,
        "gradient_norm": result.gradient_norm,
        "tokens_per_second": round(result.tokens / seconds, 1),
        "seconds": round(cursor.seconds, 3),
    }
