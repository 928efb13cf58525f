"""The report page: one self-contained HTML file from run folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tailkd.report.compare import COLUMNS, cost, gaps, lines, recipe_differences
from tailkd.report.figures import charts
from tailkd.report.findings import findings, warnings
from tailkd.report.record import Run


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Write the page of `runs` to `path`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(resources.files("tailkd.report").joinpath("page.html").read_text("utf-8"))
    path.write_text(template.render(_content(runs)), encoding="utf-8")
    return path


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0]
    return {
        "title": first.name if len(runs) == 1 else f"{len(runs)} students: {', '.join(run.name for run in runs)}",
        "many": len(runs) > 1,
        "teachers": list(dict.fromkeys(run.taught_by for run in runs)),
        "findings": findings(runs),
        "warnings": warnings(runs),
        "columns": COLUMNS,
        "lines": lines(runs),
        "differences": recipe_differences(runs),
        "rows": _rows(runs),
        "charts": charts(runs),
        "samples": _samples(runs),
        "top_k": first.recipe["evaluate"]["top_k"],
        "data": first.data,
        "measured": first.evaluation["student"]["tokens"],
        "versions": first.environment["versions"],
    }


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run with its values of the keys that differ, its distance to the best and its cost."""
    differences = recipe_differences(runs)
    behind = {gap.run.folder: gap.difference for gap in gaps(runs)}
    rows = []
    for number, run in enumerate(runs):
        difference, spent = behind.get(run.folder), cost(run)
        distance = (
            f"{difference.mean:.4f} [{difference.low:.4f}, {difference.high:.4f}]"
            if difference
            else ("not comparable" if run.folder in behind else "best")
        )
        values = [column[number] for column in differences.values()]
        row = {"name": run.name, "values": values, "behind": distance}
        rows.append(row | {"seconds": f"{spent.seconds:,.0f} s", "rate": f"{spent.tokens_per_second:,.0f}"})
    return rows


def _samples(runs: Sequence[Run]) -> dict[str, Any]:
    """The prompt, and (who, text) pairs: the teachers first, then every student."""
    first = runs[0].samples
    teachers = [(name, text) for name, text in first.items() if name.startswith("teacher")]
    texts = [*teachers, *((run.name, run.samples["student"]) for run in runs)]
    return {"prompt": _readable(first["prompt"]), "texts": [(name, _readable(text)) for name, text in texts]}


def _readable(text: str) -> str:
    """Without the runs of blanks and empty lines that small models like to write."""
    return re.sub(r" {8,}", " " * 8, re.sub(r"\n\s*\n\s*\n+", "\n\n", text.strip("\n"))) or "(nothing)"
