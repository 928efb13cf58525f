"""Methods against a baseline, at the end and at equal tokens, FLOPs and seconds: numbers, and which are noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tailkd.errors import Refusal
from tailkd.report import curves, scores
from tailkd.report.compare import COLUMNS, HIGHER_IS_BETTER, PERCENT
from tailkd.report.differences import at_a_place, at_the_end, on_a_task, place_values
from tailkd.report.groups import Group, grouped, spread
from tailkd.report.record import Run
from tailkd.report.uncertainty import Difference

MEASURES = ("kl", "cross_entropy", "full_ece")
PLACES = ("end", *curves.AXES)


@dataclass(frozen=True)
class Measure:
    """A column of the held-out table, or a task."""

    title: str
    percent: bool
    higher_is_better: bool

    @property
    def name(self) -> str:
        return self.title.removesuffix(" %")

    def shown(self, value: float, *, sign: bool = False) -> str:
        digits = f"{100 * value:+.2f}" if self.percent else f"{value:+.4f}"
        return digits if sign else digits.lstrip("+")


@dataclass(frozen=True)
class Row:
    """A method's measure: one value for each seed. difference: to the baseline; None of the baseline itself."""

    group: Group
    measure: Measure
    values: list[float]
    difference: Difference | None

    @property
    def method(self) -> str:
        return self.group.label

    @property
    def value(self) -> str:
        found = self.measure.shown(statistics.fmean(self.values))
        deviation = spread(self.values)
        return found if deviation is None else f"{found} ± {self.measure.shown(deviation)}"

    @property
    def verdict(self) -> str:
        """better, worse, tie (within the noise), not known (no interval), baseline."""
        if self.difference is None:
            return "baseline"
        if self.difference.real is None:
            return "not known"
        if not self.difference.real:
            return "tie"
        return "better" if (self.difference.value > 0) == self.measure.higher_is_better else "worse"

    @property
    def gap(self) -> str:
        return "" if self.difference is None else self.measure.shown(self.difference.value, sign=True)

    @property
    def interval(self) -> str:
        """Of the wider one of the intervals that are known."""
        widest = None if self.difference is None else self.difference.widest
        if widest is None:
            return ""
        ends = (self.measure.shown(end, sign=True) for end in (widest.low, widest.high))
        return f"[{', '.join(ends)}]"


@dataclass(frozen=True)
class Section:
    """What is compared at one place. at: "end" or an axis; x: the place on that axis."""

    at: str
    x: float | None
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        return "At the end" if self.x is None else f"At equal {curves.AXES[self.at]} ({curves.amount(self.at, self.x)})"


@dataclass(frozen=True)
class Comparison:
    baseline: str
    methods: list[Group]
    sections: list[Section]
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for method in self.methods for run in method.runs]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "baseline": self.baseline,
            "methods": [{"name": m.name, "runs": [str(run.folder) for run in m.runs]} for m in self.methods],
            "sections": [_section_dict(section) for section in self.sections],
            "notes": self.notes,
        }


def compared(runs: Sequence[Run], *, baseline: Run | None = None, at: str | None = None) -> Comparison:
    """Every method of `runs` less the baseline's, which is the first run's unless given, at `at` or at every place.

    Raises:
        Refusal: fewer than two methods; a run that does not know the axis `at`.
    """
    every = [*runs, *([baseline] if baseline and baseline.folder not in [run.folder for run in runs] else [])]
    methods = grouped(every)
    if len(methods) < 2:
        raise Refusal(
            f"a comparison takes two methods or more; got {', '.join(run.name for run in runs)}, whose recipes do not "
            "differ but for the seed. `tailkd report` shows them"
        )
    first = (baseline or every[0]).folder
    base = next(method for method in methods if first in [run.folder for run in method.runs])
    sections, notes = [], []
    for place in PLACES if at is None else (at,):
        found = _section(methods, base, place)
        if isinstance(found, Section) and not (at is None and found.x is not None and _all_end(every, place, found.x)):
            sections.append(found)
        elif isinstance(found, Section):
            notes.append(
                f"All runs end at {curves.amount(place, found.x or 0)}: at equal {curves.AXES[place]} is at the end."
            )
        elif at is None:
            notes.append(found)
        else:
            raise Refusal(f"{found} Take another --at")
    return Comparison(base.name, methods, sections, notes)


def _all_end(runs: Sequence[Run], axis: str, x: float) -> bool:
    return all(curves.ends_at(run, axis, x) for run in runs)


def _section(methods: Sequence[Group], base: Group, place: str) -> Section | str:
    """What is compared there; or why it cannot be."""
    runs = [run for method in methods for run in method.runs]
    if place == "end":
        return Section(place, None, [*_end(methods, base), *_tasks(methods, base)], _uneven(runs))
    x = curves.reached(runs, place)
    if not x:
        without = ", ".join(run.name for run in runs if not curves.curve(run, place))
        if x is not None:
            early = ", ".join(run.name for run in runs if curves.ends_at(run, place, 0.0))
            return f"At equal {curves.AXES[place]}: not known, since {early} was measured before training alone."
        return f"At equal {curves.AXES[place]}: not known without a bill.json of {without}."
    rows, notes = [], []
    for key in MEASURES:
        each = {method.name: place_values(method, key, axis=place, x=x) for method in methods}
        for method in methods:
            values = each[method.name]
            if values is not None:
                known = method is not base and each[base.name] is not None
                found = at_a_place(method, base, key, axis=place, x=x) if known else None
                rows.append(Row(method, _measure(key), values, found))
    points = {run.name: curves.at(run, place, x) for run in runs}
    between = [name for name, point in points.items() if point is not None and point.interpolated]
    unknown = [name for name, point in points.items() if point is None]
    if between:
        notes.append(f"On the straight line between two evaluations: {', '.join(between)}.")
    if unknown:
        notes.append(f"Not known of {', '.join(unknown)}: first measured later (evaluate.every_tokens sets how often).")
    return Section(place, x, rows, notes)


def _end(methods: Sequence[Group], base: Group) -> Iterator[Row]:
    for key in MEASURES:
        each = [method.values(lambda run, k=key: run.evaluation["student"].get(k)) for method in methods]
        of_base = each[methods.index(base)]
        for method, values in zip(methods, each, strict=True):
            if values is not None:
                known = method is not base and of_base is not None
                yield Row(method, _measure(key), values, at_the_end(method, base, key) if known else None)


def _tasks(methods: Sequence[Group], base: Group) -> Iterator[Row]:
    """Tasks that the baseline was measured on, and at least one other method on the same items."""
    for task in scores.common([base]):
        rows = []
        for method in methods:
            values = scores.values(method, task)
            if values is not None:
                found = None if method is base else on_a_task(method, base, task)
                rows.append(Row(method, Measure(task.title, True, True), values, found))
        if len(rows) > 1:
            yield from rows


def _measure(key: str) -> Measure:
    return Measure(COLUMNS[key], key in PERCENT, key in HIGHER_IS_BETTER)


def _uneven(runs: Sequence[Run]) -> list[str]:
    ends = sorted(curves.curve(run, "tokens")[-1].x for run in runs)
    if ends[-1] <= 1.01 * ends[0]:
        return []
    first, last = (curves.amount("tokens", end) for end in (ends[0], ends[-1]))
    return [f"The runs end at {first} to {last}: not at the same budget."]


def _section_dict(section: Section) -> dict[str, Any]:
    rows = [
        {
            "method": row.method,
            "measure": row.measure.title,
            "values": row.values,
            "mean": statistics.fmean(row.values),
            "spread": spread(row.values),
            "difference": None if row.difference is None else asdict(row.difference),
            "verdict": row.verdict,
        }
        for row in section.rows
    ]
    return {"at": section.at, "x": section.x, "rows": rows, "notes": section.notes}


# ----- in words


def sentences(comparison: Comparison) -> list[str]:
    """Which differences are larger than the noise and which are not, what that noise is, and how many were tested."""
    tested = {
        s.title: [r.difference for r in s.rows if r.difference and r.difference.known] for s in comparison.sections
    }
    known = [difference for each in tested.values() for difference in each]
    told = [one for section in comparison.sections if tested[section.title] for one in _told(section, comparison)]
    unknown = [f"{title[0].lower()}{title[1:]}" for title, each in tested.items() if not each]
    if unknown:
        told.append(
            f"No interval is known {_listed(unknown)}: rows and items are stored of the end, and compared where both "
            "sides have the same; seeds give one from two of both on."
        )
    return [*told, _noise(known), _chance(len(known))] if known else told


def _told(section: Section, comparison: Comparison) -> Iterator[str]:
    """A sentence for each outcome, with the methods that have it."""
    outcomes: dict[str, list[str]] = {}
    for method in comparison.methods:
        rows = [row for row in section.rows if row.group is method and row.difference is not None]
        of = {verdict: [row.measure.name for row in rows if row.verdict == verdict] for verdict in VERDICTS}
        said = [f"{words} {_listed(of[verdict])}" for verdict, words in VERDICTS.items() if of[verdict]]
        if said:
            outcomes.setdefault("; ".join(said), []).append(method.label)
    for outcome, labels in outcomes.items():
        yield f"{section.title}, {_listed(labels)} against {comparison.baseline}: {outcome}."


VERDICTS = {
    "better": "better in",
    "worse": "worse in",
    "tie": "within the noise in",
    "not known": "no interval for",
}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _noise(tested: Sequence[Difference]) -> str:
    samples = list(dict.fromkeys(f"{d.sample.number:,} {d.sample.units}" for d in tested if d.sample))
    seeds = sorted({d.seeds.number for d in tested if d.seeds})
    if not seeds:
        return (
            f"The noise is that of the sample ({_listed(samples)}); what another seed gives is not in it: that takes "
            "two seeds of both sides."
        )
    over = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    one = any(d.seeds is None for d in tested)
    of_samples = f" and of the sample ({_listed(samples)})" if samples else ""
    return (
        f"The noise is that of {over}{of_samples}: a difference counts where every interval that is known leaves 0 out."
        f"{' Where a side has one seed, what another gives is not in it.' if one else ''}"
    )


def _chance(tested: int) -> str:
    expected = 0.05 * tested
    return (
        f"{tested} difference{'s were' if tested > 1 else ' was'} tested, each at 95 %: if nothing were different, "
        f"{expected:.2g} of them would still be called so."
    )
