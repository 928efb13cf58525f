"""Verbs that measure and compare what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Json, app, quiet
from tailkd.errors import Refusal


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
def measure(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folder, hub id, or run (its student).")],
    data: Annotated[str, typer.Option(help="Text to measure on: a file, folder or glob.")],
    field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    tokens: Annotated[int, typer.Option(min=1, help="The most to measure, spread over the text.")] = 50_000,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a row; default 2,048, or what the model takes.")
    ] = None,
    top_k: Annotated[str, typer.Option(help="Numbers K of first ids: the tail lies outside.")] = "1,5,10,20",
    revision: Annotated[str | None, typer.Option(help="Revision of the (one) model on the hub.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of a GGUF file in the (one) model's folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for measures.json and the figures.")] = None,
    json_: Json = False,
) -> None:
    """Tail mass, mismatch rate, entropy and calibration of any causal models on a text, each alone; no recipe."""
    sizes = _sizes(top_k)
    from tailkd import folder, measurement
    from tailkd.report import alone

    quiet()
    if out is not None:
        folder.refuse_unwritable(out)
    asked = measurement.Asked(data, field, tokens, context, sizes, revision, gguf_file)
    found = measurement.measure(models, asked, lambda message: print(message, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1)) if json_ else alone.print_models(found)
    if out is not None:
        files = alone.write(found, out)
        print(f"written: {', '.join(str(path) for path in files)}", file=sys.stderr)


def _sizes(top_k: str) -> tuple[int, ...]:
    try:
        sizes = sorted({int(size) for size in top_k.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise Refusal(f"--top-k is {top_k!r}; expected whole numbers from 1 on with commas between, such as 1,5,10,20")
    return tuple(sizes)


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
