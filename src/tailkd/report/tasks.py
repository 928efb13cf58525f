"""Results of tasks: averages over a suite, changes against a baseline, the table on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailkd.errors import Refusal
from tailkd.report.compare import relative_change
from tailkd.report.record import Run, checked

Result = dict[str, Any]


@dataclass(frozen=True)
class Average:
    """Over the tasks of a suite with as many shots and the same limit: the mean of their values and its standard error.

    left_out: tasks of the suite that have no result. change: relative change against the baseline in percent, over the
    tasks in `compared`; None where there is none.
    """

    suite: str
    shots: int
    limit: int | None
    value: float
    error: float
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    change: float | None
    compared: tuple[str, ...]


def results_of(place: Path) -> list[Result]:
    """The results in a run folder, in another folder with a tasks.json, or in such a file.

    Raises:
        Refusal: there are none.
    """
    path = place / "tasks.json" if place.is_dir() else place
    if not path.is_file():
        raise Refusal(f"{place} has no results of tasks (tasks.json); measure it first with `tailkd evaluate --tasks`")
    return (
        Run(path.parent).tasks if path.name == "tasks.json" else checked(json.loads(path.read_text()), path)["results"]
    )


def merged(before: Sequence[Result], now: Sequence[Result]) -> list[Result]:
    """`before`, with what was measured again replaced: one result for each task, number of shots and limit."""
    by_key = {(one["task"], one["shots"], one["limit"]): one for one in (*before, *now)}
    return list(by_key.values())


def counterpart(result: Result, baseline: Sequence[Result]) -> Result | None:
    """The baseline's result on the same items, asked in the same way."""
    keys = ("task", "shots", "items_hash")
    return next((one for one in baseline if all(one[key] == result[key] for key in keys)), None)


def averages(
    results: Sequence[Result],
    suites: Mapping[str, Sequence[str]],
    baseline: Sequence[Result] = (),
    *,
    base: float = 10,
) -> list[Average]:
    """An `Average` for each suite, number of shots and limit that has two results or more."""
    groups: dict[tuple[str, int, int | None], list[Result]] = {}
    for one in results:
        groups.setdefault((one["suite"], one["shots"], one["limit"]), []).append(one)
    found = []
    for (suite, shots, limit), group in groups.items():
        if len(group) < 2:
            continue
        names = tuple(one["task"] for one in group)
        pairs = [(one, other) for one in group if (other := counterpart(one, baseline)) is not None]
        found.append(
            Average(
                suite,
                shots,
                limit,
                sum(one["value"] for one in group) / len(group),
                math.sqrt(sum(one["error"] ** 2 for one in group)) / len(group),
                names,
                tuple(name for name in suites[suite] if name not in names),
                change(pairs, base),
                tuple(one["task"] for one, _ in pairs),
            )
        )
    return found


def change(pairs: Sequence[tuple[Result, Result]], base: float) -> float | None:
    """Relative change over pairs of results; None without a pair, and where a value is 0 and has no logarithm."""
    values = [(one["value"], other["value"]) for one, other in pairs]
    if not values or min(map(min, values)) <= 0:
        return None
    ours, theirs = zip(*values, strict=True)
    return relative_change(ours, theirs, base=base)


# ----- the table


def print_tasks(
    results: Sequence[Result], found: Sequence[Average], baseline: Sequence[Result] = (), *, base: float = 10
) -> None:
    """A row for each result, then one for each average, values in percent with their standard errors."""
    table = Table("task", "shots", "metric", "value %", "items", box=None, padding=(0, 2, 0, 0))
    for number in (1, 3, 4):
        table.columns[number].justify = "right"
    if baseline:
        table.add_column("baseline %", justify="right")
        table.add_column(f"change (base {'e' if base == math.e else f'{base:g}'})", justify="right")
    for one in results:
        row = [one["task"], str(one["shots"]), one["metric"], _value(one["value"], one["error"]), f"{one['items']:,}"]
        other = counterpart(one, baseline)
        pair = ["–", "–"] if other is None else [f"{100 * other['value']:.2f}", _change(change([(one, other)], base))]
        table.add_row(*row, *(pair if baseline else []))
    for average in found:
        row = [f"average, {average.suite}", str(average.shots), "", _value(average.value, average.error), ""]
        table.add_row(*row, *(["", _change(average.change)] if baseline else []), style="bold")
    console = Console(highlight=False)
    console.print(table)
    for average in found:
        console.print(_told(average, compared=bool(baseline)), soft_wrap=True)


def _told(average: Average, *, compared: bool) -> str:
    """What an average is over."""
    first = "" if average.limit is None else f", the first {average.limit:,} items of each"
    without = f", without {' '.join(average.left_out)}" if average.left_out else ""
    text = f"average, {average.suite}, {average.shots} shots: over {len(average.tasks)} tasks{without}{first}"
    if compared and average.compared != average.tasks:
        text += f"; change over {len(average.compared)} of them, which the baseline has with the same items and shots"
    return text


def _value(value: float, error: float) -> str:
    return f"{100 * value:.2f} ± {100 * error:.2f}"


def _change(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
