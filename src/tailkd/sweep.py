"""`tailkd sweep`: every combination of some keys' values as a run of its own, one after another, and one report."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailkd import folder, recipe_file
from tailkd.bill import bill
from tailkd.corpora import settled
from tailkd.errors import Diverged, Preempted, Refusal
from tailkd.parts import Say
from tailkd.recipe import Recipe
from tailkd.recipe_problems import Problem, RecipeRefusal
from tailkd.recipe_yaml import plain, yaml
from tailkd.report.page import write_page
from tailkd.report.record import Run, Stopped
from tailkd.run import distill

LONGEST_NAME = 200  # bytes; file systems take 255

Choices = dict[str, list[Any]]


def plan(recipe: str | Path | dict[str, Any], arguments: Sequence[str], out: Path | None = None) -> list[Recipe]:
    """A recipe for every combination of ``["objective.top_k=1,5", "training.seed=1,2"]``, the last key fastest.

    Each is checked, has its budget in tokens, and a name and run folder of its own: OUT/NAME-top_k=1-seed=1, where
    `out` is runs/NAME-sweep unless given. Keys with one value are in no name.

    Raises:
        RecipeRefusal: what is wrong with any of them, all at once.
        Refusal: values that cannot be read or give two runs one folder; a folder that holds another run.
    """
    choices = _choices(arguments)
    swept = {key: values for key, values in choices.items() if len(values) > 1}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    checked = _checked(recipe, combinations)
    base, titles = checked[0].name, _titles(swept)
    names = ["-".join([base, *(f"{titles[key]}={_label(one[key])}" for key in swept)]) for one in combinations]
    _refuse_names(names)
    above = out or Path(f"runs/{base}-sweep")
    recipes = [
        settled(one.model_copy(update={"name": name, "out": str(above / name)}), lambda line: None)
        for one, name in zip(checked, names, strict=True)
    ]
    for one in recipes:
        folder.already_finished(one, Run(one.folder))
    return recipes


def train(recipes: Sequence[Recipe], say: Say) -> tuple[list[Run], Path]:
    """Train the planned runs in turn; all of them, and the page that compares them, beside their folders.

    One that is finished is left as it is, an interrupted one goes on, and one that diverges is noted while the others
    go on. `training.stop_after` is the time of them all.

    Raises:
        Stop: what ended a run, and with it the sweep; the same call goes on.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise Refusal("a sweep trains in one process; under torchrun give its combinations to `tailkd distill`")
    started, runs = time.monotonic(), []
    for number, recipe in enumerate(recipes, 1):
        run, place = Run(recipe.folder), f"{number} of {len(recipes)}: {recipe.name}"
        if folder.already_finished(recipe, run):
            say(f"{place}: finished already")
        else:
            say(place)
            run = _trained(_within_time(recipe, started), say)
            gc.collect()  # models in reference cycles would stay beside those of the next run
        runs.append(run)
    return runs, write_page(runs, recipes[0].folder.parent / "report.html")


def _trained(recipe: Recipe, say: Say) -> Run:
    try:
        return distill(recipe)
    except Diverged as diverged:
        say(f"{recipe.name} diverged at {diverged}")
        return Stopped(recipe.folder, f"{recipe.name} diverged at {diverged}.")


def _within_time(recipe: Recipe, started: float) -> Recipe:
    limit = recipe.training.stop_after_seconds
    if limit is None:
        return recipe
    left = int(limit - (time.monotonic() - started))
    if left < 1:
        raise Preempted("training.stop_after is over; the same command goes on with the next run")
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": f"{left}s"})})


# ----- combinations


def _choices(arguments: Sequence[str]) -> Choices:
    choices: Choices = {}
    for argument in arguments:
        key, values = _choice(argument)
        if key in choices:
            raise Refusal(f"{key} is given twice; write its values in one place, as in training.seed=1,2")
        if key == "out" or (key == "name" and len(values) > 1):
            raise Refusal(f"{argument}: a sweep names its runs and their folders itself; take --out DIR for where")
        choices[key] = values
    return choices


def _choice(argument: str) -> tuple[str, list[Any]]:
    """Key and values of ``key=1,5``, as YAML reads them between brackets: commas inside brackets do not separate."""
    from ruamel.yaml.error import YAMLError

    key, _, text = argument.partition("=")
    try:
        if "," in text and key:
            return key, plain(yaml().load(f"[{text}]"))
        return key, list(recipe_file.parse_overrides([argument]).values())
    except YAMLError as error:
        raise Refusal(
            f"{argument}: not values between commas; expected them as in a YAML list: 1,5 or [0.9,0.95],[0.9,0.99]"
        ) from error


def _checked(recipe: str | Path | dict[str, Any], combinations: Iterable[dict[str, Any]]) -> list[Recipe]:
    checked, problems, refused = [], {}, None
    for overrides in combinations:
        try:
            checked.append(recipe_file.read(recipe, overrides))
        except RecipeRefusal as refusal:
            refused = refused or refusal
            problems |= {(problem.key, problem.message): problem for problem in refusal.problems}
    if refused is not None:
        found: list[Problem] = list(problems.values())
        raise RecipeRefusal(refused.name, found, refused.places)
    return checked


def _titles(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or all of it where two keys share that."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: key if list(last.values()).count(name) > 1 else name for key, name in last.items()}


def _label(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _refuse_names(names: list[str]) -> None:
    unfit = sorted({name for name in names if names.count(name) > 1 or len(name.encode()) > LONGEST_NAME})
    if unfit:
        raise Refusal(
            f"runs would be named {', '.join(unfit[:3])}: expected names that differ, of at most {LONGEST_NAME} bytes; "
            "give each value once, and fewer or shorter ones"
        )


# ----- what all of it costs


def print_bills(recipes: Sequence[Recipe]) -> None:
    """A table on standard output: tokens, executed operations, memory, hours and money of each run, and of all.

    The last row adds up; its memory is that of the largest, since one runs after the other.
    """
    table = Table("run", box=None, padding=(0, 2, 0, 0))
    table.columns[0].overflow = "fold"
    for title in ("tokens", "PFLOP", "memory GB", "hours", "money"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = [_row(recipe) for recipe in recipes]
    for recipe, row in zip(recipes, rows, strict=True):
        table.add_row(recipe.name, *_cells(row))
    tokens, operations, memory, hours, money = zip(*rows, strict=True)
    table.add_section()
    total = (sum(tokens), _sum(operations), max(memory), _sum(hours), _sum(money))
    table.add_row(f"all {len(rows)}", *_cells(total), style="bold")
    console = Console(highlight=False)
    console.print(table)
    if total[3] is None:
        console.print("hours need hardware.peak_flops, money hardware.price_per_hour; `tailkd check --load` measures")


Row = tuple[int, float, int, float | None, float | None]


def _row(recipe: Recipe) -> Row:
    found = bill(recipe)
    operations = found.executed.total * recipe.tokens / 1e6
    return recipe.tokens, operations, found.memory.total, found.hours, found.money


def _cells(row: tuple[Any, ...]) -> list[str]:
    tokens, operations, memory, *others = row
    cells = [f"{tokens:,}", f"{operations:,.3g}", f"{memory / 1e9:,.2f}"]
    return cells + [_short(value) for value in others]


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f}" if value >= 10 else f"{value:.3g}"


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
