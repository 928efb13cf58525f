"""Hub data set, files of every kind or a folder of them -> documents with stable ids."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tailkd.data.chat import ANSWERS, CHAT, PLAIN, Example, Turn
from tailkd.data.files import KINDS, NAMED, BadRecords, Hashes, Record, records, suffix
from tailkd.errors import Refusal

__all__ = ["NAMED", "BadRecords", "Document", "Source"]

FINISHED = "finished"  # field of a record: false where its text was cut off


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
            found = sorted(p for p in path.rglob("*") if p.is_file() and suffix(p.name) in KINDS)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            kinds = ", ".join(KINDS)
            raise Refusal(f"no file at {self.path!r}; expected a file, a folder with files of {kinds}, or a glob")
        return found

    def fingerprint(self, hashes: Hashes | None = None) -> dict[str, Any]:
        """What the token ids depend on: each file's name, size and content hash, or the Hub revision."""
        if self.hub is not None:
            place = {"hub": self.hub, "config": self.config, "split": self.split, "revision": self.revision}
            return {**self.fields, **place}
        files = self.files()
        contents = (hashes or Hashes(None)).of(files)
        listed = [[p.name, p.stat().st_size, content] for p, content in zip(files, contents, strict=True)]
        return {**self.fields, "files": listed}

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
        """Where each usable record stands, its text or its turns, and whether it comes to an end."""
        for where, record in self._found(bad):
            content = self._content(record, where, bad)
            if content is not None:
                yield where, content, isinstance(record, str) or record.get(FINISHED) is not False

    def _content(self, record: Record, where: str, bad: BadRecords) -> str | Example | None:
        """The text or the turns of a record; None of a bad one."""
        fields = self.fields
        if isinstance(record, str):
            if "text" in fields:
                return record
            bad.add(where, "a text file has no fields")
            return None
        if "messages" in fields:
            turns = _turns(record, fields["messages"], where, bad)
            return None if turns is None else Example(turns, CHAT)
        if "prompt" in fields:
            prompt = _field(record, fields["prompt"], where, bad)
            answer = None if prompt is None else _field(record, fields["completion"], where, bad)
            if prompt is None or answer is None:
                return None
            return Example((Turn("user", prompt), Turn(ANSWERS, answer)), fields["template"])
        return _field(record, fields["text"], where, bad)

    def _found(self, bad: BadRecords) -> Iterator[tuple[str, Record]]:
        if self.hub is not None:
            name = f"{self.hub}[{self.split}]"
            yield from ((f"{name}:{number}", row) for number, row in enumerate(_hub_rows(self)))
            return
        for path in self.files():
            fields = [self.fields[key] for key in self.fields if key != "template"]
            yield from records(path, fields, bad, optional=(FINISHED,))


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
