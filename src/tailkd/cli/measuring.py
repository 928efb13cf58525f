"""Verbs that measure and compare what was trained."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Json, app, quiet
from tailkd.errors import Refusal


class Base(StrEnum):
    """Of the logarithm in a relative change."""

    ten, e = "10", "e"


class Precision(StrEnum):
    auto, float32, bfloat16 = "auto", "float32", "bfloat16"


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run folder; with --tasks also a folder or hub id.")
    ],
    tasks: Annotated[str | None, typer.Option(help="commonsense, mathematics, or names of tasks, with commas.")] = None,
    shots: Annotated[str, typer.Option(help="Examples before each commonsense item, such as 0,5.")] = "0",
    limit: Annotated[int | None, typer.Option(min=2, help="The first so many items of each task.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the tasks' files; nothing is fetched then.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Run folder or tasks.json to compare with.")] = None,
    base: Annotated[Base, typer.Option(help="Logarithm of the relative change.")] = Base.ten,
    out: Annotated[
        Path | None, typer.Option(help="Folder of a bare model's results, by default evaluations/NAME.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file in the model's folder.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the weights; by default the run's, or auto.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 8,
    json_: Json = False,
) -> None:
    """Measure a run's student again on the held-out rows; with --tasks it, or any model, on those tasks."""
    quiet()
    if tasks is None:
        _on_heldout_rows(model, json_, given=[limit, data, baseline, out, gguf_file, precision])
        return
    from tailkd import examination
    from tailkd.report.tasks import averages, print_tasks, results_of

    asked = examination.Asked(tasks, _numbers(shots), limit, data, batch_size)
    products = None if precision is None else precision.value
    subject = examination.subject(model, gguf_file=gguf_file, out=out, products=products)
    against = [] if baseline is None else results_of(baseline)
    found = examination.examine(subject, asked, lambda message: print(message, file=sys.stderr, flush=True))
    number = math.e if base is Base.e else 10.0
    means = averages(found, examination.SUITES, against, base=number)
    if json_:
        print(json.dumps({"results": found, "averages": [asdict(one) for one in means]}, indent=1))
        return
    print_tasks(found, means, against, base=number)
    print(f"results: {subject.folder / 'tasks.json'}")


def _on_heldout_rows(run: str, as_json_: bool, *, given: list[object]) -> None:
    from tailkd import run as way
    from tailkd.report.record import Run
    from tailkd.report.table import as_json, print_table

    if any(option is not None for option in given):
        raise Refusal("--limit, --data, --baseline, --out, --gguf-file and --precision go with --tasks; name the tasks")
    measured = way.evaluate(Run(Path(run)), lambda message: print(message, file=sys.stderr))
    print(json.dumps(as_json([measured]), indent=1)) if as_json_ else print_table([measured])


def _numbers(shots: str) -> tuple[int, ...]:
    """``(0, 5)`` of ``"0,5"``."""
    parts = [part.strip() for part in shots.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise Refusal(f"--shots {shots!r}: expected numbers from 0 on, joined by commas, such as 0,5")
    return tuple(dict.fromkeys(map(int, parts)))


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


class At(StrEnum):
    """Where runs are compared."""

    end, tokens, flops, seconds = "end", "tokens", "flops", "seconds"


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; seeds of one recipe are one row.")],
    baseline: Annotated[Path | None, typer.Option(metavar="RUN", help="What is subtracted; default the first.")] = None,
    at: Annotated[At | None, typer.Option(help="Where; default everywhere that is known.")] = None,
    json_: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write the HTML page of these runs too.")] = None,
) -> None:
    """Runs at equal tokens, FLOPs and seconds, and which of their differences are larger than the noise."""
    from tailkd.report.findings import warnings
    from tailkd.report.page import write_page
    from tailkd.report.record import Run
    from tailkd.report.table import print_comparison
    from tailkd.report.verdicts import compared, sentences

    opened = [Run(folder) for folder in runs]
    base = None if baseline is None else Run(baseline)
    found = compared(opened, baseline=base, at=None if at is None else at.value)
    told = warnings(found.runs)
    page = None if out is None else write_page(found.runs, out, baseline=base)
    if json_:
        print(json.dumps({**found.as_dict(), "words": sentences(found), "warnings": told}, indent=1))
        return
    print_comparison(found)
    print(*(f"warning: {warning}" for warning in told), *([] if page is None else [f"report: {page}"]), sep="\n")
