"""Negative log-likelihoods of training rows under a model: read once, kept on disk, files that are whole or not there.

A scoring is a folder: `scores.bin`, one entry a row, and `manifest.json`, which says what they were made of and makes
it finished; before that `chunks`, of `CHUNK_ROWS` rows each. A chunk is read by one process in batches that depend on
nothing but the rows, so that kills and the number of processes change no bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tailkd.data.files import file_hash
from tailkd.data.packing import Row, Rows
from tailkd.errors import DataError, Refusal
from tailkd.teacher.chunks import Ranks, alone, remove_temporary, shared_out, write_whole

FORMAT = 1
CHUNK_ROWS = 256
INSTANCES = 64  # rows whose ids both scorings of a pair must have read
SCORES, MANIFEST, CHUNKS = "scores.bin", "manifest.json", "chunks"
PER_ROW = np.dtype([("nll", "<f8"), ("weight", "<i8")])
"""nll: sum over the row, nats. weight: what its mean divides by, tokens or UTF-8 bytes."""
PER_TOKEN = np.dtype("<f4")
"""Loss of each position, nats; 0 where there is nothing to predict."""
_DIGEST = 16  # bytes of a chunk's own hash at its end

Read = Callable[[Sequence[Row]], np.ndarray]


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
        with alone(scoring.folder, "scores", say) if ranks.leads else nullcontext():
            missing = ranks.gathered(_missing(scoring) if ranks.leads else [])[0]
            if missing:
                read = reader()
                shared_out(
                    missing,
                    lambda number: _write_chunk(scoring, number, read, batch_size),
                    ranks=ranks,
                    heed=heed,
                    made=lambda count: say(f"scores: {count:,} of {len(missing):,} chunks of rows"),
                )
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
    remove_temporary(scoring.folder)
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
    write_whole(_chunk(scoring, number), [content, xxhash.xxh3_128_digest(content)], point="chunk")


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

    write_whole(scoring.folder / SCORES, pieces(), point="scores")
    manifest = {
        "format": FORMAT,
        "made_of": scoring.made_of,
        "rows": len(scoring.rows),
        "instances": scoring.instances,
        "xxh3_128": digest.hexdigest(),
    }
    write_whole(scoring.folder / MANIFEST, [json.dumps(manifest, indent=1).encode()], point="manifest")
    shutil.rmtree(scoring.folder / CHUNKS)
