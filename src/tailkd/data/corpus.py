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

from tailkd.data.chat import ANSWERS, CHAT, PLAIN, Example, Turn
from tailkd.errors import Refusal

JSONL, PARQUET, TEXT = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt", ".text", ".md", ".rst")
FINISHED = "finished"  # field of a record: false where its text was cut off
NAMED = 5  # bad records shown by file and line


class Document(NamedTuple):
    """One text with an id that survives re-runs (file and line, or row) and the hash of its content.

    example: where only the answers in it are learned, its turns; `text` is then their contents.
    finished: whether it comes to an end; not where its record says ``"finished": false``, as of text that was cut off.
    """

    id: str
    text: str
    hash: int
    example: Example | None = None
    finished: bool = True


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
    """Where documents come from: `path` (file, folder or glob) or a Hub data set, and which fields they are made of.

    The fields are `text`; or `prompt` and `completion`, put into `template`; or `messages`, a list of {role, content}.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    template: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template makes texts of the records."""
        return self.messages is not None or self.template == CHAT

    @property
    def fields(self) -> dict[str, str]:
        """What is read of a record, and how it becomes a text."""
        if self.messages is not None:
            return {"messages": self.messages}
        if self.prompt is not None and self.completion is not None:
            return {"prompt": self.prompt, "completion": self.completion, "template": self.template or PLAIN}
        return {"text": self.text}

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
            place = {"hub": self.hub, "config": self.config, "split": self.split, "revision": self.revision}
            return {**self.fields, **place}
        files = self.files()
        return {**self.fields, "files": [[p.name, p.stat().st_size, _file_hash(p)] for p in files]}

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        """The documents in order; records that hold none are counted in `bad`."""
        for where, content, finished in self._contents(bad):
            turns = () if isinstance(content, str) else content.turns
            text = content if isinstance(content, str) else content.text
            if not text.strip() or any(not turn.content.strip() for turn in turns if turn.role != "system"):
                bad.add(where, "empty text")
                continue
            try:
                hashed = (json.dumps(turns, ensure_ascii=False) if turns else text).encode("utf-8")
            except UnicodeEncodeError:
                bad.add(where, "lone surrogate")
                continue
            if "\x00" in text:
                bad.add(where, "NUL character")
                continue
            example = None if isinstance(content, str) else content
            yield Document(where, text, xxhash.xxh3_64_intdigest(hashed), example, finished)

    def _contents(self, bad: BadRecords) -> Iterator[tuple[str, str | Example, bool]]:
        if self.hub is not None:
            yield from self._rows(_hub_rows(self), f"{self.hub}[{self.split}]", bad)
            return
        for path in self.files():
            suffix = _suffix(path)
            if suffix in JSONL:
                for where, record in _jsonl(path, bad):
                    yield from self._content(record, where, bad)
            elif suffix in PARQUET:
                columns = [self.fields[key] for key in self.fields if key != "template"]
                yield from self._rows(_parquet_rows(path, columns), str(path), bad)
            elif "text" in self.fields:
                yield from _text(path, bad)
            else:
                bad.add(str(path), "a text file has no fields")

    def _rows(
        self, rows: Iterator[dict[str, Any]], name: str, bad: BadRecords
    ) -> Iterator[tuple[str, str | Example, bool]]:
        for number, row in enumerate(rows):
            yield from self._content(row, f"{name}:{number}", bad)

    def _content(
        self, record: dict[str, Any], where: str, bad: BadRecords
    ) -> Iterator[tuple[str, str | Example, bool]]:
        """The text or the turns of a record; none of a bad one."""
        fields = self.fields
        if "messages" in fields:
            turns = _turns(record, fields["messages"], where, bad)
            content = None if turns is None else Example(turns, CHAT)
        elif "prompt" in fields:
            prompt = _field(record, fields["prompt"], where, bad)
            answer = None if prompt is None else _field(record, fields["completion"], where, bad)
            asked = () if prompt is None or answer is None else (Turn("user", prompt), Turn(ANSWERS, answer))
            content = Example(asked, fields["template"]) if asked else None
        else:
            content = _field(record, fields["text"], where, bad)
        if content is not None:
            yield where, content, record.get(FINISHED) is not False


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
    if not _has(record, name, where, bad):
        return None
    text = record[name]
    if not isinstance(text, str):
        bad.add(where, f"field {name!r} is not text", f" but {_kind(text)}")
        return None
    return text


def _has(record: dict[str, Any], name: str, where: str, bad: BadRecords) -> bool:
    if name not in record:
        bad.add(where, f"no field {name!r}", f"; it has {', '.join(map(repr, record)) or 'none'}")
    return name in record


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _turns(record: dict[str, Any], name: str, where: str, bad: BadRecords) -> tuple[Turn, ...] | None:
    """The messages in a record's field, of which at least one is an answer to something."""
    if not _has(record, name, where, bad):
        return None
    messages, turns = record[name], []
    if not isinstance(messages, list):
        bad.add(where, f"field {name!r} is not a list of messages", f" but {_kind(messages)}")
        return None
    for number, message in enumerate(messages, start=1):
        for key in Turn._fields:
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                came = _kind(value) if isinstance(message, dict) else f"the message is {_kind(message)}"
                bad.add(where, f"a message's {key} is not text", f" but {came} (message {number})")
                return None
        turns.append(Turn(message["role"], message["content"]))
    if not any(turn.role == ANSWERS for turn in turns[1:]) or turns[0].role == ANSWERS:
        roles = ", ".join(turn.role for turn in turns)
        bad.add(where, f"no {ANSWERS} message after another one", f"; the roles are {roles or 'none'}")
        return None
    return tuple(turns)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise KeyError("duplicate key")
    return record


def _jsonl(path: Path, bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
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
                yield where, record


def _text(path: Path, bad: BadRecords) -> Iterator[tuple[str, str, bool]]:
    with _open(path) as file:
        content = file.read()
    try:
        yield str(path), content.decode("utf-8-sig").replace("\r\n", "\n"), True
    except UnicodeDecodeError:
        bad.add(str(path), "not UTF-8")


def _parquet_rows(path: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise Refusal(f"{path} is not a readable parquet file ({error})") from error
    known = file.schema_arrow.names
    columns = [*names, *({FINISHED} & set(known))] if set(names) <= set(known) else None
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
