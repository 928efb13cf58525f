"""The report page: one self-contained HTML file from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tailkd.report import figures
from tailkd.report.compare import COLUMNS, lines
from tailkd.report.record import Run


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Write the page of `runs` to `path`."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(resources.files("tailkd.report").joinpath("page.html").read_text("utf-8"))
    title = " · ".join(run.name for run in runs)
    page = template.render(title=title, columns=COLUMNS, lines=lines(runs), curve=figures.heldout_curve(runs))
    path.write_text(page, encoding="utf-8")
    return path
