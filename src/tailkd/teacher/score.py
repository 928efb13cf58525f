"""Negative log-likelihoods of training rows under a model: read once, kept on disk, files that are whole or not there.

A scoring is a folder: `scores.bin`, one entry a row, and `manifest.json`, which says what they were made of and makes
it finished; before that `chunks`, of `CHUNK_ROWS` rows each. A chunk is read by one process in batches that depend on
nothing but the rows, so that kills and the number of processes change no bit.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from tailkd.data.files import file_hash
from tailkd.data.packing import Row, Rows
from tailkd.errors import DataError, Refusal
from tailkd.fault import at

FORMAT = 1
CHUNK_ROWS = 256
INSTANCES = 64  # rows whose ids both scorings of a pair must have read
SCORES, MANIFEST, CHUNKS, LOCK = "scores.bin", "manifest.json", "chunks", "lock"
PER_ROW = np.dtype([("nll", "<f8"), ("weight", "<i8")])
"""nll: sum over the row, nats. weight: what its mean divides by, tokens or UTF-8 bytes."""
PER_TOKEN = np.dtype("<f4")
"""Loss of each position, nats; 0 where there is nothing to predict."""
_DIGEST = 16  # bytes of a chunk's own hash at its end

Read = Callable[[Sequence[Row]], np.ndarray]
T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run, as `tailkd.train.ranks.Ranks` tells of them."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def leads(self) -> bool: ...
    def gathered(self, value: T) -> list[T]: ...
    def wait(self) -> None: ...


@dataclass(frozen=True)
class Scoring:
    """What is scored and by what; its folder inside `store` is named by the fingerprint of both."""

    rows: Rows
    made_of: dict[str, Any]
    store: Path
    per_token: bool = False

    @cached_property
    def folder(self) -> Path:
        everything = {"format": FORMAT, "rows": self.rows.fingerprint, **self.made_of}
        return self.store / f"scores-{xxhash.xxh3_128_hexdigest(json.dumps(everything, sort_keys=True).encode())}"

    @cached_property
    def instances(self) -> str:
        """Hash of what `INSTANCES` rows, spread over all, read and predict."""
        digest = xxhash.xxh3_128()
        for number in np.unique(np.linspace(0, len(self.rows) - 1, INSTANCES).astype(int)):
            row = self.rows[int(number)]
            digest.update(row.input_ids.tobytes())
            digest.update(row.labels.tobytes())
        return digest.hexdigest()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a finished scoring."""
        return json.loads((self.folder / MANIFEST).read_text())

    @property
    def finished(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def table(self) -> np.ndarray:
        """The finished scores, memory-mapped: `PER_ROW` (rows,), or `PER_TOKEN` (rows, context).

        Raises:
            Refusal: the file is not the one that was written, or was made of other rows.
        """
        manifest, path = self.manifest, self.folder / SCORES
        if manifest["rows"] != len(self.rows) or manifest["instances"] != self.instances:
            raise Refusal(f"{self.folder} holds scores of other rows than these; delete the folder to score anew")
        if not path.is_file() or file_hash(path) != manifest["xxh3_128"]:
            raise Refusal(f"{path} is damaged; delete the folder to score anew")
        shape = (len(self.rows), self.rows.context) if self.per_token else (len(self.rows),)
        return np.memmap(path, dtype=PER_TOKEN if self.per_token else PER_ROW, mode="r", shape=shape)


def score(
    scoring: Scoring,
    reader: Callable[[], Read],
    *,
    batch_size: int,
    ranks: Ranks,
    heed: Callable[[], None],
    say: Callable[[str], None],
) -> np.ndarray:
    """The scores of all rows: opened where they are finished, else made by all `ranks`, from the chunks that are there.

    Args:
        reader: makes what reads `batch_size` rows at a time; called only where rows are missing.
        heed: called before each round of chunks, on all ranks equally often, and may raise to stop.

    Raises:
        Refusal: see `Scoring.table`.
        DataError: the disk does not take them, or ranks do not share it.
    """
    try:
        with _alone(scoring.folder, say) if ranks.leads else _nothing():
            missing = ranks.gathered(_missing(scoring) if ranks.leads else [])[0]
            if missing:
                read = reader()
                for start in range(0, len(missing), ranks.world):
                    heed()
                    own = missing[start + ranks.rank : start + ranks.rank + 1]
                    for number in own:
                        _write_chunk(scoring, number, read, batch_size)
                    say(f"scores: {min(start + ranks.world, len(missing)):,} of {len(missing):,} chunks of rows")
            ranks.wait()
            if ranks.leads and not scoring.finished:
                _assemble(scoring)
    except OSError as error:
        raise DataError(
            f"scores cannot be written to {scoring.folder} ({error}); make room and run the same command: it goes on "
            "from the chunks that are there"
        ) from error
    ranks.wait()
    return scoring.table()


# ----- files


def _chunks(scoring: Scoring) -> range:
    return range(-(-len(scoring.rows) // CHUNK_ROWS))


def _chunk(scoring: Scoring, number: int) -> Path:
    return scoring.folder / CHUNKS / f"{number:06d}"


def _missing(scoring: Scoring) -> list[int]:
    """The chunks that are to be read, after what a dead scoring left is gone."""
    for left in scoring.folder.rglob(".tmp-*"):
        left.unlink()
    if scoring.finished:
        shutil.rmtree(scoring.folder / CHUNKS, ignore_errors=True)
        return []
    (scoring.folder / CHUNKS).mkdir(exist_ok=True)
    return [number for number in _chunks(scoring) if _whole(_chunk(scoring, number)) is None]


def _write_chunk(scoring: Scoring, number: int, read: Read, batch_size: int) -> None:
    rows = range(number * CHUNK_ROWS, min((number + 1) * CHUNK_ROWS, len(scoring.rows)))
    parts = [
        read([scoring.rows[row] for row in rows[start : start + batch_size]])
        for start in range(0, len(rows), batch_size)
    ]
    content = np.concatenate(parts).astype(PER_TOKEN if scoring.per_token else PER_ROW, copy=False).tobytes()
    _write(_chunk(scoring, number), [content, xxhash.xxh3_128_digest(content)])


def _whole(path: Path) -> bytes | None:
    """A chunk's content, if it is what was written."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    content, digest = content[:-_DIGEST], content[-_DIGEST:]
    return content if xxhash.xxh3_128_digest(content) == digest else None


def _assemble(scoring: Scoring) -> None:
    """All chunks as one file, then the manifest that makes it finished."""
    digest = xxhash.xxh3_128()

    def pieces() -> Iterator[bytes]:
        for number in _chunks(scoring):
            content = _whole(_chunk(scoring, number))
            if content is None:
                raise DataError(
                    f"{_chunk(scoring, number)} is not there, though every process has written its share; data.store "
                    "must be a folder that all machines of the run share"
                )
            digest.update(content)
            yield content

    _write(scoring.folder / SCORES, pieces())
    manifest = {
        "format": FORMAT,
        "made_of": scoring.made_of,
        "rows": len(scoring.rows),
        "instances": scoring.instances,
        "xxh3_128": digest.hexdigest(),
    }
    _write(scoring.folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    shutil.rmtree(scoring.folder / CHUNKS)


def _write(path: Path, pieces: Iterator[bytes] | list[bytes]) -> None:
    """A file under a name of its own, on the disk, and only then under its name."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    kind = path.stem if path.parent.name != CHUNKS else "chunk"
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
                at(f"{kind}:middle")
            file.flush()
            os.fsync(file.fileno())
        at(f"{kind}:before")
        temporary.replace(path)
        at(f"{kind}:after")
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run scores the same; one that died holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"scores: another process makes the same ones in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
