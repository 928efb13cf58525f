"""Writing a teacher down: every row once, by all processes, the same bytes however often it is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from tailkd.data.batches import Batch, collate
from tailkd.data.files import file_hash
from tailkd.data.packing import IGNORED, Row
from tailkd.errors import DataError, Refusal
from tailkd.objective import Dense, Head, written_down
from tailkd.objective.chunked import logits_in_blocks
from tailkd.objective.layout import with_sequences
from tailkd.teacher.cache import HEAD, MANIFEST, Manifest, head_bytes, log_probabilities
from tailkd.teacher.chunks import Ranks, alone, remove_temporary, shared_out, write_whole
from tailkd.teacher.shards import ROW_BYTES, Damaged, Entry, Payload, Shard, name_of, packed, packed_ids

SHARD_BYTES = 64 << 20  # about; a killed writing loses at most one of each process
BLOCK_BYTES = 4 << 20  # of float32 logits that are read at once

Signal = Callable[[Batch], Head | Dense]


class SomeRows(Protocol):
    """Training rows, as `tailkd.data.packing.Rows` and mixtures of them are."""

    @property
    def context(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Row: ...


@dataclass(frozen=True)
class Writing:
    """What is written where. `manifest` without files, `rows` all that are to be read from the cache.

    keys: of the rows. positions: of each row that predict something.
    """

    folder: Path
    manifest: Manifest
    rows: SomeRows
    keys: tuple[bytes, ...]
    positions: tuple[int, ...]

    @staticmethod
    def of(folder: Path, manifest: Manifest, rows: SomeRows) -> Writing:
        """Reads every row once."""
        each = (rows[number] for number in range(len(rows)))
        found = [(row.key, int((row.labels != IGNORED).sum())) for row in each]
        keys, positions = zip(*found, strict=True)
        return Writing(folder, manifest, rows, keys, positions)

    @property
    def payload(self) -> Payload:
        return self.manifest.payload

    def bytes_of(self, numbers: Sequence[int]) -> int:
        """What the rows with these numbers take on the disk, but for the headers of their shards."""
        positions = sum(self.positions[number] for number in numbers)
        return positions * self.payload.position_bytes + len(numbers) * ROW_BYTES


def write(
    writing: Writing,
    teacher: Callable[[], Signal],
    *,
    batch_size: int,
    ranks: Ranks,
    heed: Callable[[], None],
    say: Callable[[str], None],
) -> Manifest:
    """Write the rows that the cache does not have yet, by all `ranks`; whole shards of an interrupted writing stay.

    Args:
        teacher: makes what turns a batch into a signal; called only where rows are missing.
        heed: called before each round of shards, on all ranks equally often, and may raise to stop.

    Raises:
        Refusal: the folder holds another cache or other files; the disk is too small.
        DataError: the disk does not take them, ranks do not share it, or the teacher is not finite.
    """
    try:
        with alone(writing.folder, "cache", say) if ranks.leads else nullcontext():
            chunks, head = ranks.gathered(_begun(writing, say) if ranks.leads else ([], False))[0]
            if chunks or head:
                work = _Work(writing, teacher(), batch_size)
                if ranks.leads and head:
                    work.write_head()
                shared_out(
                    chunks,
                    work.write_shard,
                    ranks=ranks,
                    heed=heed,
                    made=lambda count: say(f"cache: {count:,} of {len(chunks):,} shards"),
                )
            ranks.wait()
            if ranks.leads:
                _finish(writing)
    except OSError as error:
        raise DataError(
            f"the cache cannot be written to {writing.folder} ({error}); make room and run the same command: it goes "
            "on from the shards that are there"
        ) from error
    ranks.wait()
    return Manifest.read(writing.folder)


# ----- before


def refuse_other(folder: Path, made_of: dict[str, object]) -> None:
    """Refuse a folder that holds a cache of something else, or no cache but other files."""
    if not (folder / MANIFEST).is_file():
        other = [path.name for path in (folder.iterdir() if folder.is_dir() else ()) if not _ours(path)]
        if other or (folder.exists() and not folder.is_dir()):
            raise Refusal(f"{folder} holds other files and no cache; give another cache.path")
        return
    then = Manifest.read(folder).made_of
    told = differences(then, made_of)
    if told:
        raise Refusal(
            f"{folder} holds the cache of something else:{told}\ngive another cache.path, take the old values back, or "
            "delete the folder"
        )


def differences(then: dict[str, object], now: dict[str, object]) -> str:
    """The keys that differ, a line each; empty where none does."""
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return "".join(f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)


def _ours(path: Path) -> bool:
    return path.name == "lock" or path.name == HEAD or path.suffix == ".safetensors" or path.name.startswith(".tmp-")


def _begun(writing: Writing, say: Callable[[str], None]) -> tuple[list[list[int]], bool]:
    """The shards that are to be made, as the numbers of their rows, and whether the vocabulary matrix is.

    The folder is in order for them afterwards.
    """
    folder, manifest = writing.folder, writing.manifest
    refuse_other(folder, manifest.made_of)
    remove_temporary(folder)
    there = _whole_shards(writing)
    known = {key for shard in there.values() for key in shard}
    missing: dict[bytes, int] = {}
    for number, key in enumerate(writing.keys):
        if key not in known:
            missing.setdefault(key, number)
    numbers, each = list(missing.values()), manifest.payload.position_bytes
    needed, free = writing.bytes_of(numbers), shutil.disk_usage(folder).free
    say(
        f"cache: {len(numbers):,} of {len(set(writing.keys)):,} different rows are to be written to {folder}: "
        f"{needed / 1e6:,.1f} MB, {each:,} bytes a token; the disk has {free / 1e6:,.1f} MB free"
    )
    if free < needed:
        raise Refusal(
            f"{folder}: {needed / 1e6:,.1f} MB are still to be written and the disk has {free / 1e6:,.1f} MB free; "
            "give another cache.path, free some, or keep less with cache.tail_samples, cache.top_k or cache.payload"
        )
    if not (folder / MANIFEST).is_file():
        manifest.write(folder)
    size = max(1, SHARD_BYTES // (writing.rows.context * each))
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return chunks, manifest.payload.kind == "hidden" and not _has_head(folder)


def _has_head(folder: Path) -> bool:
    path, told = folder / HEAD, Manifest.read(folder).head
    return bool(told) and path.is_file() and file_hash(path) == told["xxh3_128"]


def _whole_shards(writing: Writing) -> dict[str, list[bytes]]:
    """The keys of each whole shard in the folder; what is none goes.

    Those that the manifest names were whole when it was written; their length is looked at, `--verify` reads them.
    """
    folder, found = writing.folder, {}
    listed = Manifest.read(folder).shards if (folder / MANIFEST).is_file() else {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == HEAD:
            continue
        try:
            shard = Shard(path, writing.payload)
            if path.stat().st_size != listed.get(path.name, {}).get("bytes"):
                for place in range(len(shard)):
                    shard.row(place)
            keys = [key.tobytes() for key in shard.keys.numpy()]
            if path.name != name_of(keys, writing.manifest.fingerprint):
                raise Damaged(f"{path} does not hold the rows that its name says")
            found[path.name] = keys
        except Damaged:
            path.unlink()
    return found


def _finish(writing: Writing) -> None:
    """The manifest of all that is there."""
    folder = writing.folder
    before = Manifest.read(folder)
    shards, head = {}, before.head
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == HEAD:
            continue
        told = before.shards.get(path.name)
        if told is None or told["bytes"] != path.stat().st_size:
            shard = Shard(path, writing.payload)
            told = {"xxh3_128": file_hash(path), "bytes": path.stat().st_size}
            told |= {"rows": len(shard), "positions": shard.borders[-1]}
        shards[path.name] = told
    there = {key for name in shards for key in map(bytes, Shard(folder / name, writing.payload).keys.numpy())}
    lacking = set(writing.keys) - there
    if lacking:
        raise DataError(
            f"{folder} lacks {len(lacking):,} rows, though every process has written its share; cache.path must be a "
            "folder that all machines of the run share"
        )
    finished = replace(before, shards=shards, head=head)
    if finished != before:
        finished.write(folder)


# ----- rows


class _Work:
    """The teacher reads rows, and their signals become shards."""

    def __init__(self, writing: Writing, signal: Signal, batch_size: int) -> None:
        self.writing, self.signal, self.batch_size = writing, signal, batch_size

    def write_shard(self, numbers: list[int]) -> None:
        writing = self.writing
        keys = [writing.keys[number] for number in numbers]
        entries: list[Entry] = []
        for start in range(0, len(numbers), self.batch_size):
            entries += self._read([writing.rows[number] for number in numbers[start : start + self.batch_size]])
        path = writing.folder / name_of(keys, writing.manifest.fingerprint)
        write_whole(path, [packed(keys, entries)], point="shard")

    @torch.no_grad()
    def write_head(self) -> None:
        """The vocabulary matrix of a hidden payload, and what the manifest says of it."""
        folder, rows = self.writing.folder, self.writing.rows
        head = _head(self.signal(_placed(collate([rows[0]], (0,)), self.signal)))
        content = head_bytes(head.weight, head.bias)
        about = {"scale": head.scale, "softcap": head.softcap, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        write_whole(folder / HEAD, [content], point="head")
        replace(Manifest.read(folder), head=about).write(folder)

    @torch.no_grad()
    def _read(self, rows: Sequence[Row]) -> list[Entry]:
        batch = collate(rows, range(len(rows)))
        signal = self.signal(_placed(batch, self.signal))
        found = self._hidden(signal, batch) if self.writing.payload.kind == "hidden" else self._blocks(signal, batch)
        columns = {name: torch.cat(parts) for name, parts in found.items()}
        if not all(torch.isfinite(columns[name]).all() for name in _FINITE if name in columns):
            raise DataError(
                "the teacher is not finite on some training rows, so nothing can be learned from it; look at its "
                "weights and at teacher.dtype"
            )
        borders = batch.row_borders
        return [{name: column[start:stop] for name, column in columns.items()} for start, stop in pairwise(borders)]

    def _hidden(self, signal: Head | Dense, batch: Batch) -> dict[str, list[Tensor]]:
        hidden = _head(signal).hidden.flatten(0, 1)
        return {"hidden": [hidden[batch.valid.to(hidden.device)].cpu()]}

    def _blocks(self, signal: Head | Dense, batch: Batch) -> dict[str, list[Tensor]]:
        """Tail or dense payload of the valid positions, some at a time."""
        payload = self.writing.payload
        layout = with_sequences(batch.valid, batch.row_borders, batch.labels.shape[1], None)
        uniforms = _uniforms(batch, payload.tail_samples) if payload.kind == "tail" else torch.zeros(0)
        found: dict[str, list[Tensor]] = {name: [] for name in payload.tensors}
        for place, logits, _ in logits_in_blocks(signal, None, layout, max(1, BLOCK_BYTES // (4 * payload.usable))):
            if payload.kind == "dense":
                columns = {"log_probabilities": log_probabilities(logits)}
            else:
                drawn = uniforms[place].to(logits.device)
                temperature = self.writing.manifest.made_of["temperature"]
                cached = written_down(logits, top_k=payload.top_k, uniforms=drawn, temperature=temperature)
                columns = cached.tensors
            for name, column in columns.items():
                column = column.cpu()
                found[name].append(packed_ids(column) if name.endswith("_ids") else column.float())
        return (
            found if layout.count else {name: [torch.zeros(0, *s, dtype=d)] for name, (s, d) in payload.tensors.items()}
        )


_FINITE = ("hidden", "log_probabilities", "head_log_probabilities", "tail_entropy")


def _head(signal: Head | Dense) -> Head:
    if isinstance(signal, Head):
        return signal
    assert len(signal.heads) == 1  # several teachers have no hidden states in common (tailkd.cache refuses)
    return signal.heads[0]


def _placed(batch: Batch, signal: Signal) -> Batch:
    return batch.to(getattr(signal, "device", torch.device("cpu")))


def _uniforms(batch: Batch, draws: int) -> Tensor:
    """Numbers in [0, 1) for each valid position, (valid, draws), a pure function of each row's content.

    One in each of as many equal parts: the estimate stays unbiased and varies less than with independent ones.
    """
    parts: list[np.ndarray] = []
    for key, (start, stop) in zip(batch.keys, pairwise(batch.row_borders), strict=True):
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        parts.append(generator.random((stop - start, draws)))
    return (torch.from_numpy(np.concatenate(parts)) + torch.arange(draws)) / draws
