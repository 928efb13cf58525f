"""Every sample of a task on the disk: batch by batch while they are made, then one line an item."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tailkd.errors import DataError, Refusal
from tailkd.evaluate.mathematics.tasks import Item


@dataclass(frozen=True)
class Sample:
    """What was asked, answered and found.

    tokens: those of the answer. finished: whether it came to an end before their limit. unasked: why the model was not
    asked, "" where it was. verified: math-verify's verdict, None without it or where it had none.
    """

    id: str
    question: str
    prompt: str
    generated: str
    tokens: int | None
    finished: bool | None
    unasked: str
    extracted: str
    gold: str
    correct: bool
    verified: bool | None = None


class Log:
    """``NAME.jsonl``, a sample a line in the items' order; until it is whole, ``NAME.jsonl.partial``, a batch a line.

    So a batch is written whole or not at all, and the file in the end does not tell how often it was interrupted.
    Every line names the `generator`: samples of another one, or of other prompts or gold answers, are refused.
    """

    def __init__(self, path: Path, generator: str, items: Sequence[Item]) -> None:
        self.path, self.generator, self.items = path, generator, items
        self.partial = path.with_name(f"{path.name}.partial")
        self._file: IO[bytes] | None = None
        self.seconds = 0.0

    def whole(self) -> list[Sample] | None:
        """The samples of all items; None where the file is not there yet.

        Raises:
            Refusal: it is another's.
        """
        if not self.path.exists():
            return None
        lines = self.path.read_bytes().splitlines()
        known = self._known([self._read(line, self.path) for line in lines], self.path)
        if known.keys() != {item.id for item in self.items}:
            raise Refusal(
                f"{self.path} has {len(known)} items, not these {len(self.items)}; move it away to begin anew"
            )
        self.partial.unlink(missing_ok=True)  # of a process that was killed between the last two lines of `finish`
        return [known[item.id] for item in self.items]

    @contextmanager
    def growing(self) -> Iterator[dict[str, Sample]]:
        """Open it for `append`, and yield the samples that it has by id; other processes are kept out.

        Raises:
            Refusal: it is another's, another process is writing it, or it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("a+b", buffering=0)
        except OSError as error:
            raise Refusal(f"{self.path} cannot be written ({error.strerror}); give another folder") from error
        with self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refusal(f"{self.path} is being written by another process; wait for it, or stop it") from error
            self._file.seek(0)
            content = self._file.read()
            end = content.rfind(b"\n") + 1  # behind it lies what a killed process left of a line
            self._file.truncate(end)
            batches = [self._read(line, self.partial) for line in content[:end].splitlines()]
            try:
                rows = [{"generator": batch["generator"], **row} for batch in batches for row in batch["samples"]]
                self.seconds = sum(batch["seconds"] for batch in batches)
            except (LookupError, TypeError) as error:
                raise self._no_log(self.partial, error) from error
            yield self._known(rows, self.partial)

    def append(self, samples: Sequence[Sample], seconds: float) -> None:
        """A batch, and how long its answers took.

        Raises:
            DataError: the disk does not take it.
        """
        assert self._file is not None
        self.seconds += seconds
        batch = {"generator": self.generator, "seconds": seconds, "samples": [asdict(sample) for sample in samples]}
        line = json.dumps(batch).encode() + b"\n"
        try:
            written = self._file.write(line)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        if written != len(line):
            raise self._failed("it takes no whole line")

    def finish(self, samples: Sequence[Sample]) -> None:
        """The file under its own name, whole or not at all.

        Raises:
            DataError: the disk does not take it.
        """
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for sample in samples:
                    file.write(json.dumps({"generator": self.generator, **asdict(sample)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self.partial.unlink()
        except OSError as error:
            raise self._failed(error) from error

    def _read(self, line: bytes, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError(f"it holds {found!r}")
            return found
        except ValueError as error:
            raise self._no_log(path, error) from error

    def _known(self, rows: Sequence[dict[str, Any]], path: Path) -> dict[str, Sample]:
        """The samples by id, where they are this generator's answers to these items."""
        try:
            others = {str(generator) for row in rows if (generator := row.pop("generator")) != self.generator}
            samples = [Sample(**row) for row in rows]
        except (LookupError, TypeError) as error:
            raise self._no_log(path, error) from error
        if others:
            raise Refusal(
                f"{path} holds samples of another model or of other settings ({', '.join(sorted(others))}, not "
                f"{self.generator}); give another folder or move it away"
            )
        known = {sample.id: sample for sample in samples}
        for item in self.items:
            if item.id in known and (known[item.id].prompt, known[item.id].gold) != (item.prompt, item.gold):
                raise Refusal(
                    f"{path} has item {item.id} with another prompt or gold answer; move it away to begin anew"
                )
        return known

    def _no_log(self, path: Path, error: Exception) -> Refusal:
        return Refusal(f"{path} is no log of samples: {error}; move it away to begin anew")

    def _failed(self, why: object) -> DataError:
        return DataError(
            f"{self.path} cannot be written any more ({why}); what is written stands: make room and run the same "
            "command"
        )
