"""Task results of several models: which can be compared, and their averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.report.groups import Group
from tailkd.report.record import Run


@dataclass(frozen=True, order=True)
class Task:
    """What two results must share to be compared: task, shots and the very items."""

    suite: str
    name: str
    shots: int
    items: str

    @property
    def title(self) -> str:
        return f"{self.name} ({self.shots} shots)"


def results(run: Run) -> dict[Task, dict[str, Any]]:
    """A run's results by task."""
    return {Task(one["suite"], one["task"], one["shots"], one["items_hash"]): one for one in run.tasks}


def common(groups: Sequence[Group]) -> list[Task]:
    """The tasks that every run of every group has on the same items, in the order of the first run."""
    each = [results(run) for group in groups for run in group.runs]
    return [task for task in each[0] if all(task in one for one in each)] if each else []


def tasks_of(groups: Sequence[Group]) -> list[Task]:
    """All tasks that some group has in all of its runs, by suite, in the order in which they were measured."""
    found: dict[Task, None] = {}
    for group in groups:
        found |= dict.fromkeys(common([group]))
    suites = list(dict.fromkeys(task.suite for task in found))
    return sorted(found, key=lambda task: suites.index(task.suite))


def values(group: Group, task: Task) -> list[float] | None:
    """The value of each of the group's runs."""
    return group.values(lambda run: results(run).get(task, {}).get("value"))


def items(group: Group, task: Task) -> list[float]:
    """Each item's score, averaged over the group's runs."""
    each = [results(run)[task]["scores"] for run in group.runs]
    return [sum(scores) / len(each) for scores in zip(*each, strict=True)]


@dataclass(frozen=True)
class Average:
    """Mean over tasks of one suite, with the standard error that their items give it."""

    suite: str
    shots: int
    tasks: int
    values: list[float]
    error: float


def averages(group: Group, tasks: Sequence[Task]) -> list[Average]:
    """Of each suite and number of shots with two tasks or more; every task counts once."""
    found = []
    for suite, shots in dict.fromkeys((task.suite, task.shots) for task in tasks):
        of = [task for task in tasks if (task.suite, task.shots) == (suite, shots)]
        if len(of) > 1:
            each = [results(run) for run in group.runs]
            means = [sum(one[task]["value"] for task in of) / len(of) for one in each]
            errors = [math.sqrt(sum(one[task]["error"] ** 2 for task in of)) / len(of) for one in each]
            found.append(Average(suite, shots, len(of), means, sum(errors) / len(errors)))
    return found
