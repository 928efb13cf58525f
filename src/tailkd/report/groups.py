"""Seeds of one method: runs whose recipes differ in nothing else are one row of a comparison."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tailkd.report.record import Run, flattened

OWN = ("name", "out", "training.seed")


@dataclass(frozen=True)
class Group:
    """One method: runs of as many seeds, each once."""

    name: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    def values(self, read: Callable[[Run], float | None]) -> list[float] | None:
        """What `read` gives of each run; None where one of them has nothing."""
        found = [read(run) for run in self.runs]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The methods among `runs`, in the order of their first runs; a seed that comes twice is a method of its own."""
    found: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        recipe = {key: value for key, value in flattened(run.recipe).items() if key not in OWN}
        for other, members in found:
            if other == recipe and seed(run) not in map(seed, members):
                members.append(run)
                break
        else:
            found.append((recipe, [run]))
    shared = [_name([run.name for run in members]) for _, members in found]
    names = [
        name if shared.count(name) == 1 else members[0].name for name, (_, members) in zip(shared, found, strict=True)
    ]
    return [Group(_numbered(names, at), tuple(members)) for at, (_, members) in enumerate(found)]


def _numbered(names: Sequence[str], at: int) -> str:
    """The name, with a number where one before it is the same."""
    before = names[:at].count(names[at])
    return f"{names[at]} #{before + 1}" if before else names[at]


def seed(run: Run) -> int:
    return run.recipe["training"]["seed"]


def _name(names: Sequence[str]) -> str:
    """What the names share, without the end that counts seeds: ``tad-seed=1, tad-seed=2`` are ``tad``."""
    if len(names) == 1:
        return names[0]
    shared = "".join(letters[0] for letters in takewhile(lambda found: len(set(found)) == 1, zip(*names, strict=False)))
    return re.sub(r"([-_. ]+(seed|s))?[-_=. ]*$", "", shared) or names[0]


def matched(one: Group, other: Group) -> tuple[Group, Group, bool]:
    """The runs that are compared, and whether they are pairs of one seed: where two seeds or more are common, those."""
    common = [seed(run) for run in one.runs if seed(run) in map(seed, other.runs)]
    if len(common) < 2:
        return one, other, False
    sides = [Group(g.name, tuple(sorted((r for r in g.runs if seed(r) in common), key=seed))) for g in (one, other)]
    return sides[0], sides[1], True


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else None
