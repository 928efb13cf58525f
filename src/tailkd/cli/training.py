"""Verbs that train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Fresh, Json, Overrides, RecipePath, app, quiet
from tailkd.errors import BUG


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the demo's runs; default runs/demo or runs/pretrained.")
    ] = None,
    fresh: Fresh = False,
    kill_and_resume: Annotated[
        bool, typer.Option("--kill-and-resume", help="Kill a run three times and show that nothing is lost.")
    ] = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="A really pretrained teacher and prose, out of packages.")
    ] = False,
) -> None:
    """Corpus, teacher and five students made on this machine, without network; a report at the end."""
    if kill_and_resume and pretrained:
        raise typer.BadParameter("--kill-and-resume and --pretrained are demos of their own; take one")
    from tailkd.report.table import print_table

    quiet()
    if kill_and_resume:
        from tailkd.interruption import show

        raise typer.Exit(0 if show(out or Path("runs/demo"), lambda line: print(line, flush=True)) else BUG)
    if pretrained:
        from tailkd import pretrained as real

        runs, page, found = real.run(out or Path("runs/pretrained"), fresh=fresh)
        told = list(real.lines(found))
    else:
        from tailkd import demo as offline

        runs, page = offline.run(out or Path("runs/demo"), fresh=fresh)
        told = []
    print_table(runs)
    print(*told, f"report: {page}", sep="\n")


@app.command()
def distill(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Go on although this key has another value than before.")
    ] = None,
) -> None:
    """Train a student by a recipe and measure it; the same command goes on with an interrupted run.

    Exit codes: 0 done, 2 refused, 75 stopped and saved (run it again), 76 diverged, 77 out of memory, 78 data or disk.
    """
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    from tailkd import run as way
    from tailkd.report.table import print_table

    quiet()
    finished = way.distill(checked, fresh=fresh, allow_change=allow_change or ())
    if way.leads():
        print_table([finished])
        print(f"report: {finished.folder / 'report.html'}")


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")], json_: Json = False
) -> None:
    """How runs stand: step, losses, speed, time left, last checkpoint; also while another process trains them."""
    from tailkd.report import status as standing
    from tailkd.report.record import Run

    found = [standing.status(Run(folder)) for folder in runs]
    if json_:
        print(json.dumps(found, indent=1))
        return
    print(*(line for one in found for line in standing.lines(one)), sep="\n")


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=a,b,c ...]", help="Values to try: objective.top_k=1,5,10,20.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what all of them cost, and start nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/NAME-sweep.")] = None,
) -> None:
    """Train every combination of values, one after another; the same command goes on with an interrupted sweep.

    Exit codes: as of distill; a run that diverges ends no sweep.
    """
    from tailkd import sweep as combinations
    from tailkd.report.table import print_table

    planned = combinations.plan(recipe, overrides or [], out)
    if dry_run:
        combinations.print_bills(planned)
        return
    quiet()
    runs, page = combinations.train(planned, lambda message: print(message, file=sys.stderr, flush=True))
    print_table(runs)
    print(f"report: {page}")


@app.command()
def shrink(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    overrides: Overrides = None,
) -> None:
    """Write the untrained student that `student.from_teacher` cuts out of the teacher, and its tokenizer."""
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []), files=False)
    from tailkd import pair

    quiet()
    made = pair.shrink(checked, out)
    counted = f"{made.total:,} parameters, {made.embedding:,} of them embeddings, {made.trainable:,} to be trained"
    print(f"{out}: {counted}")
