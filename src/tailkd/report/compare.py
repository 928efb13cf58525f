"""Runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.report.record import Run

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


@dataclass(frozen=True)
class Line:
    """One model's measures in a table."""

    name: str
    role: str
    measures: dict[str, Any]

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
                found.append(Line(title if len(seen) == 1 else f"{title} of {run.name}", role, measures))
    return found + [Line(run.name, "student", run.evaluation["student"]) for run in runs]


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
