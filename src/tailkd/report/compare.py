"""Runs side by side: the table, what is best, what differs between the recipes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tailkd.report.differences import at_the_end
from tailkd.report.groups import Group, grouped, spread
from tailkd.report.record import Run, flattened
from tailkd.report.uncertainty import Difference

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
TESTED = ("kl", "cross_entropy")  # measures with sums per held-out row, so that a tie can be told from a win


@dataclass(frozen=True)
class Line:
    """One model's measures in a table, of several seeds their means.

    marks: column -> "best", or "tie" where the difference to it is within the noise. spread: standard deviation over
    seeds.
    """

    name: str
    role: str
    measures: dict[str, Any]
    marks: dict[str, str] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    def cell(self, column: str) -> str:
        value = self.measures.get(column)
        return "-" if value is None else shown(column, value)

    def deviation(self, column: str) -> str:
        """Behind the mean of several seeds; nothing of one."""
        return f"± {shown(column, self.spread[column])}" if column in self.spread else ""


def shown(column: str, value: float) -> str:
    """A measure's value as tables have it: percent or nats."""
    return f"{100 * value:.2f}" if column in PERCENT else f"{value:.4f}"


def lines(runs: Sequence[Run]) -> list[Line]:
    """Teacher and student before once each (where all runs share them), then the student of every method."""
    found: list[Line] = []
    for role, title in (("teacher", "teacher"), ("student_before", "student before")):
        seen: list[dict[str, Any]] = []
        for run in runs:
            measures = run.evaluation.get(role)
            if measures is not None and measures not in seen:
                seen.append(measures)
                found.append(Line(title if len(seen) == 1 else f"{title} of {run.name}", role, measures))
    groups = grouped(runs)
    return found + _marked([_line(group) for group in groups], groups)


def _line(group: Group) -> Line:
    each = {column: group.values(lambda run, c=column: run.evaluation["student"].get(c)) for column in COLUMNS}
    known = {column: values for column, values in each.items() if values}
    means = {column: statistics.fmean(values) for column, values in known.items()}
    spreads = {column: s for column, values in known.items() if (s := spread(values)) is not None}
    return Line(group.label, "student", means, spread=spreads)


def _marked(students: list[Line], groups: Sequence[Group]) -> list[Line]:
    marks: list[dict[str, str]] = [{} for _ in students]
    for column in COLUMNS if len(students) > 1 else ():
        values = [value for line in students if (value := line.measures.get(column)) is not None]
        if len(values) < len(students):
            continue
        best = values.index((max if column in HIGHER_IS_BETTER else min)(values))
        marks[best][column] = "best"
        for number, group in enumerate(groups):
            if column in TESTED and number != best and at_the_end(group, groups[best], column).real is False:
                marks[number][column] = "tie"
    return [replace(line, marks=mark) for line, mark in zip(students, marks, strict=True)]


def ranking(runs: Sequence[Run]) -> tuple[str, list[Group]]:
    """The measure that decides, held-out KL or without a teacher cross-entropy, and the methods, best first."""
    measure = "kl" if all(run.evaluation["student"]["kl"] is not None for run in runs) else "cross_entropy"
    return measure, sorted(grouped(runs), key=lambda group: mean(group, measure))


def mean(group: Group, measure: str) -> float:
    """Over the group's seeds, at the end."""
    return statistics.fmean(run.evaluation["student"][measure] for run in group.runs)


@dataclass(frozen=True)
class Gap:
    """How far a method lies behind the best one in the measure that decides."""

    group: Group
    difference: Difference


def gaps(runs: Sequence[Run]) -> list[Gap]:
    """Every method but the best, with its distance to it."""
    measure, ranked = ranking(runs)
    return [Gap(group, at_the_end(group, ranked[0], measure)) for group in ranked[1:]]


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
