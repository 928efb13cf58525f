"""The command itself: what a verb's arguments look like, and what a run ends with."""

from __future__ import annotations

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


def quiet() -> None:
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
