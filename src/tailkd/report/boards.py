"""The page's tables of comparison, as texts in rows and columns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tailkd.report import scores
from tailkd.report.compare import COLUMNS
from tailkd.report.differences import on_a_task
from tailkd.report.groups import Group, spread
from tailkd.report.uncertainty import Z95, Interval, of_a_share
from tailkd.report.verdicts import MEASURES, Row, Section


@dataclass(frozen=True)
class Cell:
    """A number, what stands behind it in small letters, and a word for it ("best", "tie", "larger" ...)."""

    text: str = "-"
    more: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Board:
    """columns: their titles. rows: title -> a cell for each column. above: (title, columns) over the titles."""

    columns: list[str]
    rows: dict[str, list[Cell]]
    above: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tasks(groups: Sequence[Group]) -> Board | None:
    """A row for each task, a column for each method; the averages are over the tasks that all methods have."""
    found = scores.tasks_of(groups)
    if not found:
        return None
    rows = {
        f"{task.name} ({task.shots} shots, {_items(groups, task):,} items)": _task_row(groups, task) for task in found
    }
    shared = scores.common(groups)
    for of in zip(*(scores.averages(group, shared) for group in groups), strict=True):
        cells = [_average(average) for average in of]
        rows[f"average, {of[0].suite} ({of[0].shots} shots, {of[0].tasks} tasks)"] = cells
    return Board([group.label for group in groups], rows)


def _items(groups: Sequence[Group], task: scores.Task) -> int:
    return next(one[task]["items"] for group in groups for run in group.runs if task in (one := scores.results(run)))


def _task_row(groups: Sequence[Group], task: scores.Task) -> list[Cell]:
    each = [scores.values(group, task) for group in groups]
    means = [None if values is None else statistics.fmean(values) for values in each]
    known = [mean for mean in means if mean is not None]
    best = means.index(max(known)) if len(known) == len(groups) > 1 else None
    row = []
    for number, (group, values) in enumerate(zip(groups, each, strict=True)):
        mark = "" if best is None else "best" if number == best else _tie(group, groups[best], task)
        row.append(Cell() if values is None else _share(values, of_a_share(values[0], _items([group], task)), mark))
    return row


def _tie(group: Group, best: Group, task: scores.Task) -> str:
    return "tie" if on_a_task(group, best, task).real is False else ""


def _share(values: Sequence[float], interval: Interval, mark: str = "") -> Cell:
    """In percent: of one run with the interval of its sample, of several with their spread."""
    deviation = spread(values)
    low, high = 100 * interval.low, 100 * interval.high
    more = f"[{low:.1f}, {high:.1f}]" if deviation is None else f"± {100 * deviation:.1f}"
    return Cell(f"{100 * statistics.fmean(values):.1f}", more, mark)


def _average(average: scores.Average) -> Cell:
    half, value = Z95 * average.error, average.values[0]
    return _share(average.values, Interval(max(0.0, value - half), min(1.0, value + half), average.tasks, "tasks"))


def sources(groups: Sequence[Group]) -> Board | None:
    """Cross-entropy and KL of each source's held-out rows, where there are several sources."""
    each = [[run.evaluation["student"].get("sources", {}) for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for of in each for one in of for name in one))
    if not names:
        return None
    measures = [m for m in ("kl", "cross_entropy") if any(one[n].get(m) for of in each for one in of for n in one)]
    rows = {
        group.label: [_mean_of([one.get(n, {}).get(m) for one in of]) for n in names for m in measures]
        for group, of in zip(groups, each, strict=True)
    }
    above = [(name, len(measures)) for name in names]
    return Board([COLUMNS[m] for m in measures] * len(names), rows, above)


def _mean_of(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Cell()
    deviation = spread(known)
    return Cell(f"{statistics.fmean(known):.4f}", "" if deviation is None else f"± {deviation:.4f}")


def gaps(section: Section) -> Board:
    """A row for each method but the baseline: its distance in each held-out measure, with interval and verdict."""
    of = {(row.method, row.measure.title): row for row in section.rows}
    columns = [COLUMNS[key] for key in MEASURES if any(title == COLUMNS[key] for _, title in of)]
    methods = dict.fromkeys(row.method for row in section.rows if row.difference is not None)
    rows = {method: [_gap(of.get((method, title))) for title in columns] for method in methods}
    return Board(columns, rows, notes=section.notes)


def _gap(row: Row | None) -> Cell:
    return Cell() if row is None or row.difference is None else Cell(row.gap, row.interval, row.verdict)


def places(sections: Sequence[Section]) -> Board | None:
    """A row for each method: its measures at equal tokens, FLOPs and seconds, as far as these are not the end."""
    if not sections:
        return None
    columns, rows, above = [], {}, []
    methods = dict.fromkeys(row.method for section in sections for row in section.rows)
    for section in sections:
        of = {(row.method, row.measure.title): row for row in section.rows}
        titles = list(dict.fromkeys(title for _, title in of))
        columns += titles
        above += [(section.title, len(titles))] if titles else []
        for method in methods:
            cells = rows.setdefault(method, [])
            for title in titles:
                row = of.get((method, title))
                cells.append(Cell() if row is None else Cell(row.value, mark=_seen(row)))
    notes = [f"{section.title}. {note}" for section in sections for note in section.notes]
    return Board(columns, rows, above, notes)


def _seen(row: Row) -> str:
    return row.verdict if row.verdict in ("better", "worse", "tie") else ""
