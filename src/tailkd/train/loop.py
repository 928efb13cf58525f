"""When to step, log, save, evaluate, and how a run that must stop stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tailkd.data.batches import Batch, Batches, mixed_seed
from tailkd.errors import DataError, Diverged, Preempted
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.memory import held_bytes
from tailkd.train.optim import Schedule
from tailkd.train.ranks import waiting_for
from tailkd.train.step import Step, StepResult

SKIPS_IN_A_ROW = 3  # updates that were not finite, before a run has diverged
SAVE_TRIES = 3


@dataclass(frozen=True)
class Plan:
    """How long to train and what happens on the way; intervals in tokens, None for only at the end.

    best_speed: tokens per second if matrix products ran at the devices' peak all the time; None where not known.
    """

    steps: int
    seed: int
    save_every_tokens: int | None
    evaluate_every_tokens: int | None
    best_speed: float | None = None


@dataclass(frozen=True)
class Hooks:
    """What the loop tells the run: a record of each step, an evaluation that is due, and how far the record file is."""

    record: Callable[[dict[str, Any]], None]
    evaluate: Callable[[int, int], Any]
    metrics_bytes: Callable[[], int]


@dataclass
class Loop:
    """``loop.run(cursor)`` trains from a cursor to the plan's last step; the last state is saved too."""

    step: Step
    batches: Batches
    schedule: Schedule
    checkpoints: Checkpoints
    plan: Plan
    hooks: Hooks
    cursor: Cursor = Cursor()  # noqa: RUF009, it is frozen
    saved: int = 0
    failed_saves: int = 0

    def run(self, cursor: Cursor) -> Cursor:
        """The cursor after the last step.

        Raises:
            Preempted: someone asked to stop; the state of the last whole step is saved.
            Diverged: several updates in a row were not finite; nothing of them was applied or saved.
            DataError: checkpoints cannot be written any more.
        """
        self.cursor, self.saved = cursor, cursor.step
        try:
            while self.cursor.evaluation_due or self.cursor.step < self.plan.steps:
                self._evaluate_if_due()
                if self.cursor.step < self.plan.steps:
                    self._one_step()
        except Preempted as stop:
            self.step.student.settle()
            self._save()
            self._settle()
            raise Preempted(f"{stop} (step {self.saved:,})") from None
        self._settle()
        self.step.student.model.eval()
        return self.cursor

    def _one_step(self) -> None:
        started, before = time.perf_counter(), self.cursor
        self.step.student.model.train()
        learning_rate = self.schedule(before.step)
        for group in self.step.optimizer.param_groups:
            group["lr"] = learning_rate
        # Dropout is a function of (seed, step, rank), not of what the process did before.
        torch.manual_seed(mixed_seed(self.plan.seed, before.step, self.step.ranks.rank))
        batch = self.batches[before.step]
        with waiting_for(f"to average the gradients of step {before.step + 1:,}"):
            result = self.step(batch)
        seconds = time.perf_counter() - started
        skipped = result.not_finite is not None or not result.tokens
        last = before.step + 1 == self.plan.steps
        tokens = before.tokens + result.tokens
        self.cursor = Cursor(
            step=before.step + 1,
            tokens=tokens,
            seconds=before.seconds + seconds,
            skipped=before.skipped + skipped,
            skipped_in_a_row=before.skipped_in_a_row + 1 if result.not_finite else 0,
            evaluation_due=not last and _due(self.plan.evaluate_every_tokens, before.tokens, tokens),
        )
        self.hooks.record(
            {**_record(result, self.cursor, learning_rate, seconds, batch), **self._state(result, seconds)}
        )
        self._refuse_divergence(result)
        self._evaluate_if_due()
        if last or _due(self.plan.save_every_tokens, before.tokens, tokens):
            self._save()

    def _state(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """How the machine does: bytes held, share of its best speed; asks no device to finish."""
        held, best = held_bytes(self.step.student.device), self.plan.best_speed
        return {
            **({} if held is None else {"memory_bytes": held}),
            **({} if best is None else {"utilisation": round(result.tokens / seconds / best, 4)}),
            "skipped_updates": self.cursor.skipped,
        }

    def _refuse_divergence(self, result: StepResult) -> None:
        if self.cursor.skipped_in_a_row >= SKIPS_IN_A_ROW:
            self._settle()
            raise Diverged(
                f"step {self.cursor.step:,}: the {result.not_finite} was not finite, {SKIPS_IN_A_ROW} times in a "
                f"row; none of these updates was applied, and step {self.saved:,} is the last that is saved. Lower "
                "training.learning_rate, or look at the samples that metrics.jsonl names"
            )

    def _evaluate_if_due(self) -> None:
        if self.cursor.evaluation_due:
            self.hooks.evaluate(self.cursor.step, self.cursor.tokens)
            self.cursor = replace(self.cursor, evaluation_due=False)

    def _save(self) -> None:
        """Hand the state over; a disk that fails now is tried again at the next save."""
        if self.cursor.step in (0, self.saved):
            return
        cursor = replace(self.cursor, metrics_bytes=self.hooks.metrics_bytes())
        try:
            self.checkpoints.save(self.step.student.plain, self.step.optimizer, cursor)
        except OSError as error:  # of the save before: this state was not handed over yet
            self._failed(error)
            self.checkpoints.save(self.step.student.plain, self.step.optimizer, cursor)
        self.saved = cursor.step

    def _failed(self, error: OSError) -> None:
        """A save before this one did not reach the disk."""
        self.failed_saves += 1
        self.step.say(f"a checkpoint could not be written: {error}")
        if self.failed_saves == SAVE_TRIES:
            raise DataError(
                f"{self.failed_saves} checkpoints could not be written, the last: {error}; make room and run the same "
                "command"
            ) from error

    def _settle(self) -> None:
        """Wait for the save that is under way; the last one must be on the disk."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            raise DataError(
                f"the last state could not be written: {error}; make room and run the same command"
            ) from error


def _due(every: int | None, before: int, after: int) -> bool:
    return every is not None and before // every < after // every


def _record(result: StepResult, cursor: Cursor, learning_rate: float, seconds: float, batch: Batch) -> dict[str, Any]:
    parts = {name: tally.mean() for name, tally in result.parts.items()}
    floored = result.parts.get("floored_rows")
    if floored is not None:
        parts["floored_rows"] = int(floored.sum)
    why = {}
    if result.not_finite or not result.tokens:
        why = {"skipped": result.not_finite or "no token to predict"}
    return {
        "kind": "step",
        "step": cursor.step,
        "tokens": cursor.tokens,
        "samples": [batch.samples[0], batch.samples[-1]],
        **parts,
        "learning_rate": learning_rate,
        "gradient_norm": result.gradient_norm,
        "tokens_per_second": round(result.tokens / seconds, 1),
        "seconds": round(cursor.seconds, 3),
        **why,
    }
