"""The verbs, nothing else. A verb reads its arguments, checks the recipe, and only then loads what it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tailkd.errors import BUG, Refusal, Stop

app = typer.Typer(
    help="Distil causal language models without ignoring the tail of the teacher's distribution.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Dotted keys, such as training.seed=4.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds and start anew.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of `tailkd` and `python -m tailkd`."""
    with _endings():
        app()


@contextmanager
def _endings() -> Iterator[None]:
    """A message and an exit code for what a run ends with; of an unforeseen error the traceback is in crash.json."""
    try:
        yield
    except (Refusal, Stop) as end:
        print(f"tailkd: {end}", file=sys.stderr)
        sys.exit(end.exit_code)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if not notes:
            raise
        print(f"tailkd: {notes[-1]}", file=sys.stderr)
        sys.exit(BUG)


def _quiet() -> None:
    """No progress bars of transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from tailkd import __version__

        print(f"tailkd {__version__}")
        raise typer.Exit


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

    _quiet()
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

    _quiet()
    finished = way.distill(checked, fresh=fresh, allow_change=allow_change or ())
    if way.leads():
        print_table([finished])
        print(f"report: {finished.folder / 'report.html'}")


@app.command()
def score(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Log-likelihoods by which data.select or objective.tokens choose; the same command goes on after an interruption.

    `tailkd distill` makes them too where they are missing. Exit codes: 0 done, 2 refused, 75 stopped, 78 data or disk.
    """
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    from tailkd import run as way
    from tailkd import scoring

    _quiet()
    found = scoring.score(checked, lambda message: print(message, file=sys.stderr, flush=True))
    if way.leads():
        kept = "" if found.kept is None else f", {found.kept:,} of them to train on"
        print(f"{found.rows:,} rows scored{kept}")


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
    _quiet()
    runs, page = combinations.train(planned, lambda message: print(message, file=sys.stderr, flush=True))
    print_table(runs)
    print(f"report: {page}")


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

        _quiet()
        generation.write(checked, lambda message: print(message, file=sys.stderr, flush=True), fresh=fresh)
        return
    from tailkd import generation
    from tailkd.report.record import Run
    from tailkd.report.table import print_columns

    _quiet()
    found = generation.side_by_side(Run(recipe), prompt, tokens=tokens, temperature=temperature)
    print(json.dumps({"prompt": prompt, **found}, indent=1)) if json_ else print_columns(found)


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

    _quiet()
    made = pair.shrink(checked, out)
    counted = f"{made.total:,} parameters, {made.embedding:,} of them embeddings, {made.trainable:,} to be trained"
    print(f"{out}: {counted}")


@app.command()
def evaluate(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")], json_: Json = False) -> None:
    """Measure a run's student again on the held-out rows."""
    from tailkd import run as way
    from tailkd.report.record import Run
    from tailkd.report.table import as_json, print_table

    _quiet()
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

    _quiet()
    found = inspect(checked, refused)
    if load:
        from tailkd import trial

        found["load"] = trial.load(checked, lambda message: print(message, file=sys.stderr))
    print(json.dumps(found, indent=1)) if json_ else print_tree(found)


@app.command()
def prepare(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """Tokenise the corpora of a recipe on all cores, or go on with it; `distill` does it too where it is not done."""
    from tailkd import recipe_file

    checked = recipe_file.read(recipe, recipe_file.parse_overrides(overrides or []))
    from tailkd.preparation import prepared
    from tailkd.report.table import print_tree

    _quiet()
    found = prepared(checked, lambda message: print(message, file=sys.stderr))
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
def doctor() -> None:
    """Whether this machine can run tailkd: versions, device, memory, disk."""
    from tailkd.doctor import examine

    findings = examine()
    for finding in findings:
        remedy = "" if finding.good else f"  -> {finding.remedy}"
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.what}: {finding.found}{remedy}")
    raise typer.Exit(0 if all(f.good for f in findings) else 2)
