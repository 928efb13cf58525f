"""Verbs that hand a student on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tailkd.cli.app import Json, app
from tailkd.errors import Refusal


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; new or empty.")] = None,
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Repository on the hub to upload to.")] = None,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who sees a repository that --push makes.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and where; write nothing.")] = False,
    json_: Json = False,
) -> None:
    """The student of a finished run, ready for others: weights, configuration, tokenizer, and a card written anew."""
    if (to is None) == (push is None):
        raise Refusal("tailkd export takes one of --to DIR and --push ORG/NAME")
    from tailkd import export as sharing
    from tailkd.report.record import Run

    if to is not None:
        sharing.refuse_folder(to)
    elif push is not None:
        sharing.refuse_repository(push)
    prepared = sharing.prepared(Run(run), push)
    where = str(to or f"https://huggingface.co/{push} ({'public' if public else 'private'})")
    if not dry_run and to is not None:
        sharing.into_folder(prepared, to)
    elif not dry_run and push is not None:
        where = sharing.push(prepared, push, public=public)
    found: dict[str, Any] = {"to": where, "dry_run": dry_run, "files": prepared.sizes, "left": list(prepared.left)}
    print(json.dumps(found, indent=1)) if json_ else _tell(found)


def _tell(found: dict[str, Any]) -> None:
    sizes = found["files"]
    width = max(map(len, sizes))
    for name, size in sizes.items():
        print(f"{name:<{width}}  {size:>15,} bytes")
    print(f"{'would go' if found['dry_run'] else 'went'} to {found['to']}: {sum(sizes.values()):,} bytes")
    if found["left"]:
        print(f"stays: {', '.join(found['left'])}")
