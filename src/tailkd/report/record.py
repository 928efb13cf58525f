"""A run is a folder: this file knows what lies in it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tailkd.errors import Refusal
from tailkd.secrets import masked

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A run folder, read as it is asked for.

    recipe.yaml, environment.json, metrics.jsonl, checkpoints/, student/, evaluation.json, report.html, README.md;
    tasks.json and tasks/ where tasks were measured. What an older run folder lacks of the rest is None or empty.
    """

    folder: Path

    @cached_property
    def recipe(self) -> dict[str, Any]:
        from ruamel.yaml import YAML

        path = self.folder / "recipe.yaml"
        if not path.is_file():
            raise Refusal(f"{self.folder} is not a run folder: it holds no recipe.yaml")
        return YAML(typ="safe").load(path)

    @property
    def name(self) -> str:
        return self.recipe["name"]

    @property
    def taught_by(self) -> str:
        """The teachers' names, of several with their shares of the mixture; "no teacher" without one."""
        found = self.recipe.get("teacher")
        if not found:
            return "no teacher"
        if isinstance(found, dict):
            return str(found["model"] or f"the cache {found['cache']}")
        total = sum(one["weight"] for one in found)
        shares = (f"{100 * one['weight'] / total:.3g} % {one['model']}" for one in found)
        return f"the mixture of {' and '.join(shares)}"

    @property
    def student(self) -> Path:
        """Folder of the trained student, a plain save_pretrained."""
        return self.folder / "student"

    @property
    def finished(self) -> bool:
        return (self.folder / "evaluation.json").is_file()

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json: measures of teacher, student_before and student."""
        path = self.folder / "evaluation.json"
        if not path.is_file():
            raise Refusal(f"{self.folder} has no evaluation.json yet: run `tailkd distill` on its recipe to the end")
        return self._json("evaluation.json")

    @cached_property
    def heldout(self) -> dict[str, Any]:
        """heldout.json: for each role its measures, sums per held-out row, reliability, and not in old ones
        log_reliability.
        """
        return self._json("heldout.json")

    @cached_property
    def data(self) -> dict[str, Any]:
        """data.json: documents and tokens on both sides of the split, skipped records."""
        return self._json("data.json")

    @cached_property
    def bill(self) -> dict[str, Any] | None:
        """bill.json: parameters, and FLOPs per million tokens, by the ledger (see `tailkd.bill.operations`).

        None in an older run folder, and where the ledger cannot read the models.
        """
        return self._json("bill.json") if (self.folder / "bill.json").is_file() else None

    @cached_property
    def origins(self) -> dict[str, Any]:
        """origins.json: where models and corpora come from, see `report.origins`; of an older run, as found now."""
        if (self.folder / "origins.json").is_file():
            return self._json("origins.json")
        from tailkd.report.origins import origins

        return origins(self.recipe)

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """tasks.json: results of the student on tasks; empty where none was measured."""
        return self._json("tasks.json")["results"] if (self.folder / "tasks.json").is_file() else []

    @cached_property
    def samples(self) -> dict[str, Any]:
        """samples.json: what student and teacher write after one prompt."""
        return self._json("samples.json")

    @cached_property
    def track(self) -> dict[str, Any]:
        """track.json: the key of the run in the tools that show it."""
        return self._json("track.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return checked(json.loads(path.read_text()), path)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json: versions and hardware."""
        return self._json("environment.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl: kind "step" and kind "evaluation"."""
        path = self.folder / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        checked(records[0], path)
        return records[1:]

    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out measures over the run, from the untrained student to the last."""
        return [record for record in self.metrics if record["kind"] == "evaluation"]


@dataclass(frozen=True)
class Stopped(Run):
    """A run that ended before its end, for a report: its student is what was measured last, and it wrote no text."""

    why: str = ""

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        roles = {role: one for role, one in self.heldout.items() if role != "format"}
        return {role: None if one is None else one["measures"] for role, one in roles.items()}

    @cached_property
    def samples(self) -> dict[str, Any]:
        return {"prompt": "", "student": "nothing: the run stopped before its end"}


def flattened(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}, "c": [{"d": 2}]}`` as ``{"a.b": 1, "c.0.d": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        flat |= flattened(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def checked(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if content.get("format") != FORMAT:
        raise Refusal(
            f"{path} has format {content.get('format')}; this tailkd reads format {FORMAT}: take the version that "
            "wrote it, or a newer one"
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written aside, then renamed, so that a reader never meets half a file; no secret in it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(masked(content), indent=1) + "\n")
    temporary.replace(path)


class Metrics:
    """Appends records to metrics.jsonl; a resumed run first cuts it back to where its checkpoint stood.

    A disk that takes nothing now stops no training: records wait, and are written with the next that it takes.
    """

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self._file = path.open("r+b" if resume_at else "wb", buffering=0)
        self._written, self._waiting = resume_at, b""
        self._file.truncate(resume_at)
        if not resume_at:
            self.append({"kind": "header", "format": FORMAT})

    def append(self, record: dict[str, Any]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        with suppress(OSError):
            self._file.seek(self._written)
            self._file.truncate()  # what a failed write may have left of a line
            if self._file.write(self._waiting) == len(self._waiting):
                self._written, self._waiting = self._written + len(self._waiting), b""

    def size(self) -> int:
        """Bytes of whole records on the disk."""
        return self._written

    def close(self) -> None:
        self._file.close()


class NoMetrics:
    """What a process that does not write has instead."""

    def append(self, record: dict[str, Any]) -> None: ...

    def size(self) -> int:
        return 0

    def close(self) -> None: ...
