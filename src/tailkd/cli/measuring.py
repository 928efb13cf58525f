"""Verbs that measure and compare what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Json, app, quiet


@app.command()
def evaluate(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")], json_: Json = False) -> None:
    """Measure a run's student again on the held-out rows."""
    from tailkd import run as way
    from tailkd.report.record import Run
    from tailkd.report.table import as_json, print_table

    quiet()
    measured = way.evaluate(Run(run), lambda message: print(message, file=sys.stderr))
    print(json.dumps(as_json([measured]), indent=1)) if json_ else print_table([measured])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    json_: Json = False,
    out: Annotated[Path | None, typer.Option(help="The page; default report.html in the (first) run folder.")] = None,
) -> None:
    """Table and HTML page of finished runs."""
    from tailkd.report.page import write_page
    from tailkd.report.record import Run
    from tailkd.report.table import as_json, print_table

    opened = [Run(folder) for folder in runs]
    page = write_page(opened, out or runs[0] / "report.html")
    if json_:
        print(json.dumps(as_json(opened), indent=1))
        return
    print_table(opened)
    print(f"report: {page}")
