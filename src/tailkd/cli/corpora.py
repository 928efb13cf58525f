"""Verbs that make what is trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Json, Overrides, RecipePath, app, quiet
from tailkd.errors import Refusal


@app.command()
def prepare(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """Tokenise the corpora of a recipe on all cores, or go on with it; `distill` does it too where it is not done."""
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    from tailkd.preparation import prepared
    from tailkd.report.table import print_tree

    quiet()
    found = prepared(checked, lambda message: print(message, file=sys.stderr))
    print(json.dumps(found, indent=1)) if json_ else print_tree(found)


@app.command()
def score(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Log-likelihoods by which data.select or objective.tokens choose; the same command goes on after an interruption.

    `tailkd distill` makes them too where they are missing. Exit codes: 0 done, 2 refused, 75 stopped, 78 data or disk.
    """
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    from tailkd import run as way
    from tailkd import scoring

    quiet()
    found = scoring.score(checked, lambda message: print(message, file=sys.stderr, flush=True))
    if way.leads():
        kept = "" if found.kept is None else f", {found.kept:,} of them to train on"
        print(f"{found.rows:,} rows scored{kept}")


@app.command()
def cache(
    recipe: RecipePath,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all that is written and compare checksums.")] = False,
    json_: Json = False,
) -> None:
    """Write the teacher down for every training row (`cache.path`), for any number of runs with `teacher.cache`.

    The same command goes on after an interruption. Exit codes: 0 done, 2 refused, 75 stopped, 78 data or disk.
    """
    from tailkd import recipe_file
    from tailkd.recipe_rules import CACHING

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []), files=() if verify else CACHING)
    from tailkd import cache as caching
    from tailkd import run as way

    quiet()
    found = (
        caching.verify(checked)
        if verify
        else caching.write(checked, lambda message: print(message, file=sys.stderr, flush=True))
    )
    told = {what: found.total(what) for what in ("rows", "positions", "bytes")} | {"shards": len(found.shards)}
    if not way.leads():
        return
    line = f"{told['rows']:,} rows, {told['positions']:,} tokens, {told['bytes']:,} bytes in {told['shards']:,} shards"
    print(json.dumps(told, indent=1) if json_ else line + (", all as written" if verify else ""))


@app.command()
def generate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="Recipe file, or with --prompt a run folder.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what is written and start anew.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Show what a run's models write after this text.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="With --prompt: 0 takes the likeliest tokens.")] = 0.0,
    tokens: Annotated[int, typer.Option(min=1, help="With --prompt: the most to write.")] = 60,
    json_: Json = False,
) -> None:
    """Text that the teacher writes, to a file of JSON lines; the same command goes on with an interrupted one.

    With --prompt: what teacher, untrained and trained student of a finished run write after it, side by side.
    Exit codes: as of distill.
    """
    from tailkd import recipe_file

    if prompt is None:
        if recipe.is_dir():
            raise Refusal(f"{recipe} is a folder; give a recipe file, or with a run folder --prompt TEXT")
        from tailkd.recipe_rules import WRITING

        checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []), files=WRITING)
        from tailkd import generation

        quiet()
        generation.write(checked, lambda message: print(message, file=sys.stderr, flush=True), fresh=fresh)
        return
    from tailkd import generation
    from tailkd.report.record import Run
    from tailkd.report.table import print_columns

    quiet()
    found = generation.side_by_side(Run(recipe), prompt, tokens=tokens, temperature=temperature)
    print(json.dumps({"prompt": prompt, **found}, indent=1)) if json_ else print_columns(found)
