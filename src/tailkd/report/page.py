"""The report page: one self-contained HTML file from run folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tailkd.report import boards
from tailkd.report.compare import COLUMNS, cost, lines, ranking, recipe_differences
from tailkd.report.curves import AXES
from tailkd.report.figures import charts
from tailkd.report.findings import findings, warnings
from tailkd.report.groups import grouped
from tailkd.report.record import Run
from tailkd.report.verdicts import compared, sentences


def write_page(runs: Sequence[Run], path: Path, *, baseline: Run | None = None) -> Path:
    """Write the page of `runs` to `path`; differences are to `baseline`, or to the best method."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(resources.files("tailkd.report").joinpath("page.html").read_text("utf-8"))
    path.write_text(template.render(_content(runs, baseline)), encoding="utf-8")
    return path


def _content(runs: Sequence[Run], baseline: Run | None) -> dict[str, Any]:
    first, groups = runs[0], grouped(runs)
    drawn = charts(runs)
    return {
        "title": _title(runs),
        "many": len(runs) > 1,
        "teachers": list(dict.fromkeys(run.taught_by for run in runs)),
        "findings": findings(runs),
        "warnings": warnings(runs),
        "columns": COLUMNS,
        "lines": lines(runs),
        "seeded": any(len(group.runs) > 1 for group in groups),
        "tasks": boards.tasks(groups),
        "sources": boards.sources(groups),
        **_compared(runs, baseline, several=len(groups) > 1),
        "differences": recipe_differences(runs),
        "rows": _rows(runs),
        "axes": {axis: name for axis, name in AXES.items() if any(chart.axis == axis for chart in drawn)},
        "charts": drawn,
        "samples": _samples(runs),
        "top_k": first.recipe["evaluate"]["top_k"],
        "data": first.data,
        "measured": first.evaluation["student"]["tokens"],
        "versions": first.environment["versions"],
    }


def _title(runs: Sequence[Run]) -> str:
    labels = [group.label for group in grouped(runs)]
    return labels[0] if len(labels) == 1 else f"{len(labels)} students: {', '.join(labels)}"


def _compared(runs: Sequence[Run], baseline: Run | None, *, several: bool) -> dict[str, Any]:
    """What is the difference to a baseline, and what was where on the way; nothing of one method."""
    if not several:
        return {"against": None, "gaps": None, "places": None, "words": []}
    found = compared(runs, baseline=baseline or ranking(runs)[1][0].runs[0])
    end, *rest = found.sections
    places = boards.places(rest)
    return {
        "against": found.baseline,
        "gaps": boards.gaps(end),
        "places": places,
        "words": found.notes + sentences(found),
    }


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run with its values of the keys that differ and its cost."""
    differences = recipe_differences(runs)
    rows = []
    for number, run in enumerate(runs):
        spent = cost(run)
        row = {"name": run.name, "values": [column[number] for column in differences.values()]}
        rows.append(row | {"seconds": f"{spent.seconds:,.0f} s", "rate": f"{spent.tokens_per_second:,.0f}"})
    return rows


def _samples(runs: Sequence[Run]) -> dict[str, Any]:
    """The prompt, and (who, text) pairs: the teachers first, then a student of every method."""
    first = runs[0].samples
    teachers = [(name, text) for name, text in first.items() if name.startswith("teacher")]
    students = [group.runs[0] for group in grouped(runs)]
    texts = [*teachers, *((run.name, run.samples["student"]) for run in students)]
    return {"prompt": _readable(first["prompt"]), "texts": [(name, _readable(text)) for name, text in texts]}


def _readable(text: str) -> str:
    """Without the runs of blanks and empty lines that small models like to write."""
    return re.sub(r" {8,}", " " * 8, re.sub(r"\n\s*\n\s*\n+", "\n\n", text.strip("\n"))) or "(nothing)"
