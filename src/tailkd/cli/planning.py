"""Verbs for before a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tailkd.cli.app import Json, Overrides, RecipePath, app, quiet


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    load: Annotated[bool, typer.Option("--load", help="Load the models and train a few steps: speed, memory.")] = False,
    json_: Json = False,
) -> None:
    """What a run needs, what it costs and what would break it, before it: all problems at once."""
    from tailkd import recipe_file
    from tailkd.recipe_problems import RecipeRefusal

    refused = None
    try:
        checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    except RecipeRefusal as refusal:
        if refusal.partial is None:
            raise
        checked, refused = refusal.partial, refusal
    from tailkd.inspection import check as inspect
    from tailkd.report.table import print_tree

    quiet()
    found = inspect(checked, refused)
    if load:
        from tailkd import trial

        found["load"] = trial.load(checked, lambda message: print(message, file=sys.stderr))
    print(json.dumps(found, indent=1)) if json_ else print_tree(found)


@app.command()
def ledger(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """Parameters, FLOPs, memory, disk, hours of a run, from model configurations alone."""
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []), files=False)
    from tailkd.bill import bill, settled
    from tailkd.report.table import print_tree

    found = bill(settled(checked)).as_dict()
    print(json.dumps(found, indent=1)) if json_ else print_tree(found)


@app.command()
def recipes(json_: Json = False) -> None:
    """The paper's experiments as recipes: tokens, GPUs, hours on them, memory on one; `tailkd init NAME` copies one."""
    from tailkd.catalogue import listed

    entries = listed()
    if json_:
        print(json.dumps([entry.as_dict() for entry in entries], indent=1))
        return
    width = max(len(entry.name) for entry in entries)
    print(f"{'recipe':<{width}}  table  tokens  GPUs   hours  memory")
    for e in entries:
        bill = f"{e.tokens / 1e9:5.2f}B  {e.gpus:>4}  {e.hours:6.1f}  {e.memory_bytes / 1e9:3.0f} GB"
        print(f"{e.name:<{width}}  {e.table:<5}  {bill}  {e.about}")


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe that `tailkd recipes` lists.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder to copy it to.")] = Path(),
) -> None:
    """Copy one of the paper's recipes, and the files it extends, to be changed and run."""
    from tailkd.catalogue import copied

    for path in copied(name, to):
        print(path)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; default standard output.")] = None,
) -> None:
    """JSON schema of a recipe, for editors: `tailkd schema --out recipe.schema.json` beside the recipe."""
    from tailkd import recipe_file

    text = json.dumps(recipe_file.schema(), indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
        print(f"{out}: begin a recipe with the line  {recipe_file.HEADER}")


@app.command()
def doctor() -> None:
    """Whether this machine can run tailkd: versions, device, memory, disk."""
    from tailkd.doctor import examine

    findings = examine()
    for finding in findings:
        remedy = "" if finding.good else f"  -> {finding.remedy}"
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.what}: {finding.found}{remedy}")
    raise typer.Exit(0 if all(f.good for f in findings) else 2)
