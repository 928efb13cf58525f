"""Items of the sets out of local files: which file is whose, and what must be in it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailkd.data.files import BadRecords, records
from tailkd.errors import Refusal
from tailkd.evaluate.commonsense.tasks import TASKS, Task

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv")
ON_REQUEST = ("storycloze_2018",)
"""Handed out by its makers to those who ask: the suite is measured without it where there is no file."""

Item = dict[str, Any]


@dataclass(frozen=True)
class Local:
    """A task's items and those of its training file, with where they lie; None: examples are drawn from the items."""

    path: Path
    items: list[Item]
    examples_path: Path | None = None
    examples: list[Item] | None = None


def find(tasks: Sequence[str], data: Path, *, shots: int = 0) -> dict[str, Local]:
    """The items of each task out of `data` or its folder `commonsense`; a task of `ON_REQUEST` may have none.

    Raises:
        Refusal: no such folder; tasks without a file, all at once; a file that is none of its task, or has no more
            than `shots` items to draw examples from.
    """
    if not data.is_dir():
        raise Refusal(f"--data {data} is no folder; give the one that holds the sets as JSON lines")
    folders = [folder for folder in (data / "commonsense", data) if folder.is_dir()]
    found = {name: _file(folders, TASKS[name].files) for name in tasks}
    missing = [name for name in tasks if found[name] is None and name not in ON_REQUEST]
    if missing:
        expected = "; ".join(f"{name}: {TASKS[name].files[0]}.jsonl[.gz]" for name in missing)
        raise Refusal(f"{data} lacks files of {len(missing)} tasks ({expected}); add them, or name others by --tasks")
    local = {name: _read(TASKS[name], path, folders) for name, path in found.items() if path is not None}
    for name, one in local.items():
        path, pool = (one.path, one.items) if one.examples is None else (one.examples_path, one.examples)
        if shots >= len(pool):
            raise Refusal(f"{name}: {shots} shots are to be drawn from {path}, which has {len(pool)} items")
    return local


def _read(task: Task, path: Path, folders: Sequence[Path]) -> Local:
    examples = _file(folders, task.training_files)
    return Local(path, read(task, path), examples, None if examples is None else read(task, examples))


def _file(folders: Sequence[Path], stems: Sequence[str]) -> Path | None:
    places = (folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in SUFFIXES)
    return next((path for path in places if path.is_file()), None)


def read(task: Task, path: Path) -> list[Item]:
    """The items of a file with the fields that lm-eval's definition of the task reads, of the types that it expects.

    Raises:
        Refusal: a file that cannot be read, of fewer than 2 items, or with an item that is none of this task.
    """
    bad = BadRecords()
    rows = _csv(path) if path.suffix == ".csv" else records(path, task.fields, bad)
    items = [_checked(task, where, row) for where, row in rows]
    if bad.total or len(items) < 2:
        told = "; ".join(bad.named) or f"it holds {len(items)} items, and no error is known of fewer than 2"
        raise Refusal(f"{path} is no file of {task.name}: {told}; expected one JSON object a line")
    return items


def _csv(path: Path) -> Iterator[tuple[str, Item]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            yield f"{path}, row {number}", row


def _checked(task: Task, where: str, row: Any) -> Item:
    try:
        item = {field: of(row[field]) for field, of in task.fields.items()}
        if "answerKey" in item and item["answerKey"].strip() not in item["choices"]["label"]:
            raise ValueError(f"no choice has the label {item['answerKey']!r}, which is the right answer")
        if "endings" in item and int(item["label"]) >= len(item["endings"]):
            raise ValueError(f"the right answer is {item['label']} of {len(item['endings'])} endings")
    except (KeyError, TypeError, ValueError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise Refusal(
            f"{where} is no item of {task.name}: {lacks}; expected the published fields {', '.join(task.fields)}"
        ) from error
    return {task.renamed.get(field, field): value for field, value in item.items()}
