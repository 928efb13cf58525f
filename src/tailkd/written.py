"""A file of JSON lines that grows under a temporary name and goes on after its last whole line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tailkd.errors import DataError, Refusal
from tailkd.report.record import FORMAT, checked, flattened, write_json
from tailkd.secrets import masked


class Lines:
    """``NAME.jsonl``; ``NAME.jsonl.partial`` until it is whole; ``NAME.jsonl.manifest`` says what it is made of.

    made_of: everything that its content depends on; what was begun with another value is not gone on with.
    """

    def __init__(self, path: Path, made_of: dict[str, Any]) -> None:
        self.path, self.made_of = path, masked(json.loads(json.dumps(made_of)))
        self.partial = path.with_name(f"{path.name}.partial")
        self.manifest = path.with_name(f"{path.name}.manifest")
        self._file: IO[bytes] | None = None

    def finished(self, *, fresh: bool = False) -> bool:
        """Whether the file is there, whole and made of this; not where it is to be written afresh.

        Raises:
            Refusal: what is there is another file, or made of something else.
        """
        if not self.manifest.is_file():
            if self.path.exists():
                raise Refusal(f"{self.path} is there already and `tailkd generate` did not write it; give another path")
            return False
        if fresh:
            return False
        then = flattened(checked(json.loads(self.manifest.read_text()), self.manifest)["made_of"])
        now = flattened(self.made_of)
        changed = [key for key in {**then, **now} if now.get(key) != then.get(key)]
        if changed and (self.path.exists() or self.partial.exists()):
            lines = "".join(f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise Refusal(
                f"{self.path} was made of something else:{lines}\ngive another generate.out, take the old values back, "
                "or drop what is there with --fresh"
            )
        return self.path.exists()

    @contextmanager
    def growing(self, *, fresh: bool = False) -> Iterator[int]:
        """Open it for `append`, and yield how many whole lines it has; other processes are kept out.

        One without a line leaves nothing behind.

        Raises:
            Refusal: it cannot be written, or another process writes it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("a+b", buffering=0)
        except OSError as error:
            raise Refusal(f"{self.path} cannot be written ({error.strerror}); give another generate.out") from error
        with self._file as file:
            if not self._locked(file):
                raise Refusal(f"{self.path} is being written by another process; wait for it, or stop it")
            try:
                if fresh:
                    file.truncate(0)
                    self.path.unlink(missing_ok=True)
                done = self._whole_lines(file)
                if not done:
                    write_json(self.manifest, {"format": FORMAT, "made_of": self.made_of})
                yield done
            finally:
                if self.partial.is_file() and not self.partial.stat().st_size:
                    self.partial.unlink()
                    self.manifest.unlink(missing_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        """One more line.

        Raises:
            DataError: the disk does not take it.
        """
        assert self._file is not None
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._failed(error) from error
        if written != len(line):
            raise self._failed("it takes no whole line")

    def finish(self, found: dict[str, Any]) -> None:
        """The file under its own name; `found` joins the manifest."""
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
            write_json(self.manifest, {"format": FORMAT, **found, "made_of": self.made_of})
            self.partial.replace(self.path)
        except OSError as error:
            raise self._failed(error) from error

    def records(self) -> Iterator[dict[str, Any]]:
        """Those of the lines written so far."""
        with self.partial.open("rb") as file:
            yield from map(json.loads, file)

    def _locked(self, file: IO[bytes]) -> bool:
        """Not where another process has it, or renamed it between its opening and now."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self.partial.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            return False

    def _failed(self, why: object) -> DataError:
        return DataError(
            f"{self.path} cannot be written any more ({why}); what is written stands: make room and run the same "
            "command"
        )

    def _whole_lines(self, file: IO[bytes]) -> int:
        """Count them, and cut off what a killed process or a lost page left behind the last."""
        count = size = 0
        file.seek(0)
        with self.partial.open("rb") as lines:
            for line in lines:
                if not _whole(line):
                    break
                count, size = count + 1, size + len(line)
        file.truncate(size)
        return count


def _whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
