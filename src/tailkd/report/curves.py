"""A run's held-out measures over its training, against tokens, FLOPs or time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.report.record import Run

AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}
SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PETA_PER_MILLION = 1e15 / 1e6


@dataclass(frozen=True)
class Point:
    """The student measured at x. interpolated: on the straight line between two evaluations."""

    x: float
    measures: dict[str, Any]
    interpolated: bool = False


def curve(run: Run, axis: str) -> list[Point]:
    """The student's evaluations in order, from the untrained one on; none where the run does not know the axis.

    FLOPs are those of the bill in the paper's convention, of every position of the rows trained on; seconds are those
    of training steps, without evaluations and saves.
    """
    per_step = flops_per_step(run)
    if axis == "flops" and per_step is None:
        return []
    seconds = {record["step"]: record["seconds"] for record in run.metrics if record["kind"] == "step"}

    def place(record: dict[str, Any]) -> float:
        if axis == "tokens":
            return record["tokens_trained"]
        return record["step"] * (per_step or 0.0) if axis == "flops" else seconds.get(record["step"], 0.0)

    return [Point(place(r), r) for r in run.evaluations() if r["role"] == "student"]


def flops_per_step(run: Run) -> float | None:
    """FLOPs of teacher and student for one global batch; None for a run that was made without a bill."""
    if run.bill is None:
        return None
    positions = run.recipe["training"]["batch_size"] * run.recipe["data"]["context"]
    return positions * run.bill["pflop_per_million_tokens"]["total"] * PETA_PER_MILLION


def flops(run: Run) -> float | None:
    """What the run took in all; None for a run that was made without a bill."""
    ends = curve(run, "flops")[-1:]
    return ends[0].x if ends else None


def reached(runs: Sequence[Run], axis: str) -> float | None:
    """The largest x that all runs were measured at or beyond; None where one does not know the axis."""
    ends = [curve(run, axis)[-1:] for run in runs]
    return min(end[0].x for end in ends) if all(ends) else None


def at(run: Run, axis: str, x: float) -> Point | None:
    """The run at x; None beyond its end, and before its first evaluation in training.

    Between two evaluations it lies on the straight line. Between the untrained student and the first evaluation a
    line says nothing: a loss falls steeply there.
    """
    points = curve(run, axis)
    for point in points:
        if math.isclose(point.x, x, rel_tol=1e-6):
            return point
    after = bisect_left([point.x for point in points], x)
    if not 1 < after < len(points):
        return None
    one, other = points[after - 1], points[after]
    share = (x - one.x) / (other.x - one.x)
    between = {
        name: one.measures[name] + share * (value - one.measures[name])
        for name, value in other.measures.items()
        if isinstance(value, float) and isinstance(one.measures[name], float)
    }
    return Point(x, between, interpolated=True)


def ends_at(run: Run, axis: str, x: float) -> bool:
    """Whether x is where the run ended, whose held-out rows are stored."""
    return math.isclose(curve(run, axis)[-1].x, x, rel_tol=1e-6)


def amount(axis: str, x: float) -> str:
    """``250,112 tokens``, ``1.55 TFLOP``, ``41.2 s``."""
    if axis == "tokens":
        return f"{x:,.0f} tokens"
    if axis == "seconds":
        return f"{x:,.1f} s" if x < 7200 else f"{x / 3600:,.2f} h"
    size, letter = next((one for one in SIZES if x >= one[0]), (1.0, ""))
    return f"{x / size:.4g} {letter}FLOP"
