"""Hub data set, JSONL, parquet, text file or a folder of them -> documents with stable ids."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import xxhash

from tailkd.errors import Refusal

JSONL, PARQUET, TEXT = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt", ".text", ".md", ".rst")
NAMED = 5  # bad records shown by file and line


class Document(NamedTuple):
    """One text with an id that survives re-runs (file and line, or row) and the hash of its content."""

    id: str
    text: str
    hash: int


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


@dataclass(frozen=True)
class Source:
    """Where documents come from: `path` (file, folder or glob) or a Hub data set; `text` is their field."""

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"

    def files(self) -> list[Path]:
        """The files behind `path`, in a fixed order."""
        assert self.path is not None
        path = Path(self.path).expanduser()
        if path.is_dir():
            known = JSONL + PARQUET + TEXT
            found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in known)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            kinds = ", ".join(JSONL + PARQUET + TEXT)
            raise Refusal(f"no file at {self.path!r}; expected a file, a folder with files of {kinds}, or a glob")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What the token ids depend on: each file's name, size and content hash, or the Hub revision."""
        if self.hub is not None:
            return {"hub": self.hub, "config": self.config, "split": self.split, "revision": self.revision}
        files = self.files()
        return {"text": self.text, "files": [[p.name, p.stat().st_size, _file_hash(p)] for p in files]}

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        """The documents in order; records that hold none are counted in `bad`."""
        for where, text in self._records(bad):
            if not text.strip():
                bad.add(where, "empty text")
                continue
            try:
                content = text.encode("utf-8")
            except UnicodeEncodeError:
                bad.add(where, "lone surrogate")
                continue
            if "\x00" in text:
                bad.add(where, "NUL character")
                continue
            yield Document(where, text, xxhash.xxh3_64_intdigest(content))

    def _records(self, bad: BadRecords) -> Iterator[tuple[str, str]]:
        if self.hub is not None:
            yield from self._rows(_hub_rows(self), f"{self.hub}[{self.split}]", bad)
            return
        for path in self.files():
            suffix = _suffix(path)
            if suffix in JSONL:
                yield from _jsonl(path, self.text, bad)
            elif suffix in PARQUET:
                yield from self._rows(_parquet_rows(path, self.text), str(path), bad)
            else:
                yield from _text(path, bad)

    def _rows(self, rows: Iterator[dict[str, Any]], name: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(rows):
            where = f"{name}:{number}"
            text = _field(row, self.text, where, bad)
            if text is not None:
                yield where, text


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _field(record: dict[str, Any], name: str, where: str, bad: BadRecords) -> str | None:
    if name not in record:
        bad.add(where, f"no field {name!r}", f"; it has {', '.join(map(repr, record)) or 'none'}")
        return None
    text = record[name]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        bad.add(where, f"field {name!r} is not text", f" but {kind}")
        return None
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise KeyError("duplicate key")
    return record


def _jsonl(path: Path, name: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
            except UnicodeDecodeError:
                bad.add(where, "not UTF-8")
            except KeyError:
                bad.add(where, "duplicate key")
            except (ValueError, RecursionError):
                bad.add(where, "not JSON", "" if line.endswith(b"\n") else " (the line is cut off)")
            else:
                if not isinstance(record, dict):
                    bad.add(where, "not an object")
                    continue
                text = _field(record, name, where, bad)
                if text is not None:
                    yield where, text


def _text(path: Path, bad: BadRecords) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        content = file.read()
    try:
        yield str(path), content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        bad.add(str(path), "not UTF-8")


def _parquet_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise Refusal(f"{path} is not a readable parquet file ({error})") from error
    columns = [name] if name in file.schema_arrow.names else None
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def _hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    assert source.hub is not None
    try:
        rows: Any = datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=True
        )
        yield from rows
    except (OSError, ValueError) as error:
        raise Refusal(
            f"data set {source.hub!r} (config {source.config!r}, split {source.split!r}) could not be read: {error}"
        ) from error
