"""Files of every kind -> records with stable ids, one at a time; and a file's hash, remembered for large ones."""

from __future__ import annotations

import gzip
import json
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from tailkd.errors import Refusal

JSONL, JSON, PARQUET, ZIP = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".zip",)
TEXT = (".txt", ".text", ".md", ".rst")
KINDS = JSONL + JSON + PARQUET + TEXT + ZIP
NAMED = 5  # bad records shown by file and line


@dataclass
class BadRecords:
    """Records that cannot be used, counted by reason; the first few by name."""

    counts: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {reason}{detail}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def copy(self) -> BadRecords:
        return replace(self, counts=dict(self.counts), named=list(self.named))

    def __add__(self, other: BadRecords) -> BadRecords:
        counts = {
            reason: self.counts.get(reason, 0) + other.counts.get(reason, 0)
            for reason in {**self.counts, **other.counts}
        }
        return BadRecords(counts, [*self.named, *other.named][:NAMED])


Record = dict[str, Any] | str
"""An object with fields, or the whole of a text file."""


def suffix(name: str) -> str:
    """``".jsonl"`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    path = Path(name)
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def records(
    path: Path, fields: Iterable[str], bad: BadRecords, optional: Iterable[str] = ()
) -> Iterator[tuple[str, Record]]:
    """The records of one file with where they stand (``file:line``, ``file:row``, ``file[item]``, ``zip!file``).

    Args:
        fields: what will be read of a record; other columns of a parquet file stay unread.
        bad: what is no record is counted there.
        optional: what will be read too where a record has it.

    Raises:
        Refusal: a parquet file, a zip or a gz that cannot be read.
    """
    kind = suffix(path.name)
    if kind in PARQUET:
        yield from _parquet(path, list(fields), set(optional))
    elif kind in ZIP:
        yield from _zip(path, bad)
    else:
        try:
            with _open(path) as file:
                yield from _stream(file, str(path), kind, bad)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Refusal(f"{path} is not a readable gz file ({error}); fetch or write it again") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _stream(file: IO[bytes], name: str, kind: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    if kind in JSONL:
        yield from _lines(file, name, bad)
    elif kind in JSON:
        yield from _json(file, name, bad)
    else:
        try:
            yield name, file.read().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            bad.add(name, "not UTF-8")


def _zip(path: Path, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    """Files of the kinds above but parquet, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [i for i in archive.namelist() if _kind(i) in JSONL + JSON + TEXT and not _hidden(i)]
            if not inside:
                kinds = ", ".join(JSONL + JSON + TEXT)
                raise Refusal(f"{path} holds no file of {kinds}; unpack it, or name the files themselves")
            for name in sorted(inside):
                with archive.open(name) as file:
                    yield from _stream(file, f"{path}!{name}", _kind(name), bad)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise Refusal(f"{path} is not a readable zip file ({error}); fetch or pack it again") from error


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)


def _parquet(path: Path, fields: list[str], optional: set[str]) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        there = set(file.schema_arrow.names)
        columns = sorted({*fields, *(optional & there)}) if there.issuperset(fields) else None
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}:{number}", row
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise Refusal(f"{path} is not a readable parquet file ({error})") from error


# ----- JSON


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise KeyError("duplicate key")
    return record


_decode = json.JSONDecoder(object_pairs_hook=_unique_keys).decode


def _lines(file: Iterable[bytes], name: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield from _checked(line, f"{name}:{number}", bad)


def _json(file: IO[bytes], name: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    """A .json file: an object a line, or the whole file one object or a list of them (read into memory then)."""
    first = file.readline().removeprefix(b"\xef\xbb\xbf")
    if _is_object(first):
        yield from _lines(_chain(first, file), name, bad)
        return
    content = first + file.read()
    if not content.lstrip().startswith(b"["):
        yield from _checked(content, name, bad)
        return
    for found in _parsed(content, name, bad):
        for number, item in enumerate(found):
            if isinstance(item, dict):
                yield f"{name}[{number}]", item
            else:
                bad.add(f"{name}[{number}]", "not an object")


def _is_object(line: bytes) -> bool:
    """Whether a line is JSON by itself, as each line of JSONL is; a duplicate key is said where it is read again."""
    if line.lstrip().startswith(b"["):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _checked(content: bytes, where: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    for record in _parsed(content, where, bad):
        if isinstance(record, dict):
            yield where, record
        else:
            bad.add(where, "not an object")


def _parsed(content: bytes, where: str, bad: BadRecords) -> Iterator[Any]:
    """The value, or nothing and a line in `bad`."""
    try:
        yield _decode(content.decode("utf-8"))
    except UnicodeDecodeError:
        bad.add(where, "not UTF-8")
    except KeyError:
        bad.add(where, "duplicate key")
    except (ValueError, RecursionError):
        bad.add(where, "not JSON", "" if b"\n" in content else " (the line is cut off)")


# ----- hashes


REMEMBERED_BYTES = 8 << 20  # smaller files are hashed each time
SETTLED_SECONDS = 2.0  # a file that changed this lately may change again within one tick of its clock


class Hashes:
    """Content hashes of files; those of large ones are remembered in `folder` until size or any time stamp changes.

    The stamp that counts is the time of the last change (ctime), which no program can set back: a file that is edited
    and given its old time of modification is hashed again. Files are hashed a few at a time.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / "hashes.json"
        self._known: dict[str, list[Any]] = {}
        if self._path is not None:
            with suppress(OSError, ValueError):
                self._known = dict(json.loads(self._path.read_text()))

    def of(self, paths: list[Path]) -> list[str]:
        before = len(self._known), str(self._known)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(self._of, paths))
        if self._path is not None and before != (len(self._known), str(self._known)):
            self._write(self._path)
        return found

    def _of(self, path: Path) -> str:
        stat, name = path.stat(), str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(name)
        if known is not None and known[:-1] == stamp:
            return known[-1]
        found = file_hash(path)
        if stat.st_size >= REMEMBERED_BYTES and time.time() - stat.st_ctime > SETTLED_SECONDS:
            self._known[name] = [*stamp, found]
        return found

    def _write(self, path: Path) -> None:
        """A folder that cannot be written costs the time of hashing again, nothing else."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
            temporary.write_text(json.dumps(self._known, indent=1))
            temporary.replace(path)


def file_hash(path: Path) -> str:
    """xxh3_128 of a file's bytes, as ``xxh128sum`` prints it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
