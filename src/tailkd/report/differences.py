"""One method less another: in a held-out measure, at the end or at a place on an axis, and in a task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tailkd.report import curves, scores
from tailkd.report.groups import Group, matched
from tailkd.report.record import Run
from tailkd.report.uncertainty import Difference, Interval, over_rows, over_seeds


def at_the_end(one: Group, other: Group, measure: str) -> Difference:
    """Of a held-out measure that every run has, with what is known of its noise.

    Held-out rows are resampled in pairs, both students on the same row, and the ratio of sums over tokens is taken
    again; several seeds of a method are averaged in each row first.
    """
    one, other, paired = matched(one, other)
    values = [[run.evaluation["student"][measure] for run in group.runs] for group in (one, other)]
    if not _same_rows(one, other):
        return Difference(statistics.fmean(values[0]) - statistics.fmean(values[1]))
    return _difference(*values, paired=paired, sample=_of_rows(one, other, measure))


def at_a_place(one: Group, other: Group, measure: str, *, axis: str, x: float) -> Difference | None:
    """The same at x of an axis of `tailkd.report.curves`; None where a run is not known there.

    Rows are stored of the end alone, so that the noise of the sample is known where all runs end at x.
    """
    one, other, paired = matched(one, other)
    values = [place_values(group, measure, axis=axis, x=x) for group in (one, other)]
    if values[0] is None or values[1] is None or not _same_rows(one, other):
        return None
    ended = all(curves.ends_at(run, axis, x) for run in (*one.runs, *other.runs))
    return _difference(values[0], values[1], paired=paired, sample=_of_rows(one, other, measure) if ended else None)


def place_values(group: Group, measure: str, *, axis: str, x: float) -> list[float] | None:
    """The measure of each of the group's runs at x."""

    def read(run: Run) -> float | None:
        point = curves.at(run, axis, x)
        return None if point is None else point.measures.get(measure)

    return group.values(read)


def on_a_task(one: Group, other: Group, task: scores.Task) -> Difference:
    """Of the mean score on a task that every run has, items resampled in pairs."""
    one, other, paired = matched(one, other)
    gained = [a - b for a, b in zip(scores.items(one, task), scores.items(other, task), strict=True)]
    values = [[scores.results(run)[task]["value"] for run in group.runs] for group in (one, other)]
    return _difference(*values, paired=paired, sample=over_rows(gained, [1.0] * len(gained), "items"))


def _difference(one: Sequence[float], other: Sequence[float], *, paired: bool, sample: Interval | None) -> Difference:
    value = statistics.fmean(one) - statistics.fmean(other)
    return Difference(value, sample, over_seeds(one, other, paired=paired))


def _same_rows(one: Group, other: Group) -> bool:
    """Whether all runs were measured on the same held-out rows, as far as their lengths tell."""
    tokens = [run.heldout["student"]["rows"]["tokens"] for run in (*one.runs, *other.runs)]
    return all(each == tokens[0] for each in tokens)


def _of_rows(one: Group, other: Group, measure: str) -> Interval | None:
    """None where no sums of the measure are stored."""
    rows = [run.heldout["student"]["rows"] for run in (*one.runs, *other.runs)]
    tokens = rows[0]["tokens"]
    if any(measure not in each for each in rows):
        return None
    sides = rows[: len(one.runs)], rows[len(one.runs) :]
    means = [[statistics.fmean(row) for row in zip(*(each[measure] for each in side), strict=True)] for side in sides]
    return over_rows([a - b for a, b in zip(*means, strict=True)], tokens)
