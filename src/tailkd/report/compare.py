"""Runs side by side: the table, what is best, what differs between the recipes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tailkd.report.record import Run, flattened
from tailkd.report.uncertainty import Difference, paired

COLUMNS = {
    "cross_entropy": "CE",
    "kl": "KL(T||S)",
    "head_kl": "head KL",
    "tail_kl": "tail KL",
    "full_ece": "Full-ECE %",
    "ece": "ECE %",
    "top1_agreement": "agreement %",
    "acceptance": "acceptance %",
}
PERCENT = ("full_ece", "ece", "top1_agreement", "mismatch_rate", "acceptance")
HIGHER_IS_BETTER = ("top1_agreement", "acceptance")
TESTED = ("cross_entropy", "kl")  # measures with sums per held-out row, so that a tie can be told from a win


@dataclass(frozen=True)
class Line:
    """One model's measures in a table. marks: column -> "best", or "tie" where the difference to it is within noise."""

    name: str
    role: str
    measures: dict[str, Any]
    marks: dict[str, str]

    def cell(self, column: str) -> str:
        value = self.measures.get(column)
        if value is None:
            return "-"
        return f"{100 * value:.2f}" if column in PERCENT else f"{value:.4f}"


def lines(runs: Sequence[Run]) -> list[Line]:
    """Teacher and student before once each (where all runs share them), then every run's student."""
    found: list[Line] = []
    for role, title in (("teacher", "teacher"), ("student_before", "student before")):
        seen: list[dict[str, Any]] = []
        for run in runs:
            measures = run.evaluation.get(role)
            if measures is not None and measures not in seen:
                seen.append(measures)
                found.append(Line(title if len(seen) == 1 else f"{title} of {run.name}", role, measures, {}))
    return found + _marked([Line(run.name, "student", run.evaluation["student"], {}) for run in runs], runs)


def _marked(students: list[Line], runs: Sequence[Run]) -> list[Line]:
    marks: list[dict[str, str]] = [{} for _ in students]
    for column in COLUMNS if len(students) > 1 else ():
        values = [value for line in students if (value := line.measures.get(column)) is not None]
        if len(values) < len(students):
            continue
        best = values.index((max if column in HIGHER_IS_BETTER else min)(values))
        marks[best][column] = "best"
        for number, run in enumerate(runs):
            difference = paired(run, runs[best], column) if column in TESTED and number != best else None
            if difference is not None and not difference.real:
                marks[number][column] = "tie"
    return [replace(line, marks=mark) for line, mark in zip(students, marks, strict=True)]


def ranking(runs: Sequence[Run]) -> tuple[str, list[Run]]:
    """The measure that decides (held-out KL, or cross-entropy where a run has no teacher) and the runs, best first."""
    measure = "kl" if all(run.evaluation["student"]["kl"] is not None for run in runs) else "cross_entropy"
    return measure, sorted(runs, key=lambda run: run.evaluation["student"][measure])


@dataclass(frozen=True)
class Gap:
    """How far a run lies behind the best one in the measure that decides."""

    run: Run
    difference: Difference | None


def gaps(runs: Sequence[Run]) -> list[Gap]:
    """Every run but the best, with its distance to it."""
    measure, ranked = ranking(runs)
    return [Gap(run, paired(run, ranked[0], measure)) for run in ranked[1:]]


def recipe_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Recipe keys in which the runs differ -> each run's value (None where it has none); name and folder left out."""
    recipes = [flattened(run.recipe) for run in runs]
    keys = sorted({key for recipe in recipes for key in recipe} - {"name", "out"})
    rows = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


@dataclass(frozen=True)
class Cost:
    """What a run cost: tokens trained, seconds in training steps, tokens per second of the median step."""

    tokens: int
    seconds: float
    tokens_per_second: float


def cost(run: Run) -> Cost:
    steps = [record for record in run.metrics if record["kind"] == "step"]
    rate = statistics.median(record["tokens_per_second"] for record in steps)
    return Cost(steps[-1]["tokens"], steps[-1]["seconds"], rate)


def relative_change(accuracies: Sequence[float], baseline_accuracies: Sequence[float], *, base: float = 10) -> float:
    """``mean(100 * log(a / b, base))`` over tasks: relative change against a baseline.

    Base 10 is what the paper's tables print (``math.e`` gives log-percent); the mean of logs, not the log of means.

    Raises:
        ValueError: numbers of tasks that differ, none at all, an accuracy that is not positive, a base <= 1.
    """
    if len(accuracies) != len(baseline_accuracies) or not accuracies:
        raise ValueError(
            f"{len(accuracies)} accuracies against {len(baseline_accuracies)} of the baseline; expected one a task"
        )
    if base <= 1 or min(*accuracies, *baseline_accuracies) <= 0:
        raise ValueError("relative change takes logarithms: accuracies must be > 0 and the base > 1")
    ratios = zip(accuracies, baseline_accuracies, strict=True)
    return sum(100 * math.log(a / b) / math.log(base) for a, b in ratios) / len(accuracies)
