"""Documents -> arrays on disk: on all cores, in order, and resumable.

What is written is a folder of plain files, one array each, to which only whole blocks of documents are appended.
`progress.json` says how much of each file is committed; what lies behind that was written by a process that was killed,
and is cut off. Blocks are cut by the documents alone, so nothing depends on how many processes there are or on where
an earlier one was killed.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from tailkd.data.corpus import Document
from tailkd.data.files import BadRecords
from tailkd.errors import DataError

BLOCK_DOCUMENTS, BLOCK_LETTERS = 512, 1 << 19  # a block is closed by whichever comes first
COMMIT_SECONDS = 5.0
PROGRESS = "progress.json"

Say = Callable[[str], None]
T = TypeVar("T")
R = TypeVar("R")


class Unusable(NamedTuple):
    """A document that is skipped: its place among those that were read with it, its id, the reason and a detail."""

    place: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Block:
    """Documents as arrays.

    lengths: tokens of each. totals: numbers of each of which the sums are kept, such as its UTF-8 bytes. per_token,
    per_document: what goes to ``NAME.bin``, of as many items as there are tokens or documents.
    read: how many documents were read for it. unusable: those of them that are not among the others.
    """

    lengths: np.ndarray
    totals: dict[str, np.ndarray]
    per_token: dict[str, np.ndarray]
    per_document: dict[str, np.ndarray]
    read: int
    unusable: tuple[Unusable, ...] = ()

    def first(self, documents: int) -> Block:
        """The same up to where the document with this number begins."""
        if documents == len(self.lengths):
            return self
        tokens = int(self.lengths[:documents].sum())
        skipped = {one.place for one in self.unusable}
        read = [place for place in range(self.read) if place not in skipped][documents]
        return Block(
            self.lengths[:documents],
            {name: array[:documents] for name, array in self.totals.items()},
            {name: array[:tokens] for name, array in self.per_token.items()},
            {name: array[:documents] for name, array in self.per_document.items()},
            read,
            tuple(one for one in self.unusable if one.place < read),
        )


Encode = Callable[[list[Document]], Block]


@dataclass
class Progress:
    """What is committed: documents and their tokens, sums of other numbers of them, and the size of each file.

    read: documents of the source that were looked at. unusable: those of them that are skipped.
    """

    read: int = 0
    documents: int = 0
    tokens: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    unusable: BadRecords = field(default_factory=BadRecords)

    @staticmethod
    def of(path: Path) -> Progress:
        """What the file says; nothing is done where there is none."""
        if not path.is_file():
            return Progress()
        values = json.loads(path.read_text())
        return Progress(**{**values, "unusable": BadRecords(**values["unusable"])})


def write(
    documents: Callable[[BadRecords], Iterator[Document]],
    encode: Encode,
    folder: Path,
    *,
    limit: int | None,
    processes: int,
    say: Say,
) -> tuple[Progress, BadRecords]:
    """Append what `encode` makes of the documents to files in `folder`, going on from what is committed there.

    Besides the arrays of a `Block` there is ``offsets.bin``, int64 borders of the documents among the tokens.

    Args:
        documents: reads the source from its beginning, each time the same, and counts bad records.
        limit: stop before the first document with which there would be more tokens.
        processes: that call `encode`, on Linux; they are forked, so that what it refers to costs no memory again.

    Returns:
        What is committed; the bad records of the source and, behind them, the documents that `encode` found unusable.
    """
    with _Writer(folder) as writer:
        done = writer.progress
        if done.read:
            say(f"tokens: going on behind {done.documents:,} documents, {done.tokens:,} tokens")
        bad = BadRecords()
        blocks = _blocks(islice(documents(bad), done.read, None), bad)
        for block, bad_then in mapped(encode, blocks, processes):
            count = len(block.lengths)
            if limit is not None:
                count = int(np.searchsorted(np.cumsum(block.lengths), limit - done.tokens, side="right"))
            writer.append(block.first(count))
            say(f"tokens: {done.documents:,} documents, {done.tokens:,} tokens")
            if count < len(block.lengths):
                bad = bad_then  # the reader may be further on
                break
        writer.commit()
        return done, bad + done.unusable


def _blocks(documents: Iterator[Document], bad: BadRecords) -> Iterator[tuple[list[Document], BadRecords]]:
    """Documents in lists of a bounded size, each with the bad records until its end."""
    block, letters = [], 0
    for document in documents:
        block.append(document)
        letters += len(document.text)
        if len(block) == BLOCK_DOCUMENTS or letters >= BLOCK_LETTERS:
            yield block, bad.copy()
            block, letters = [], 0
    if block:
        yield block, bad.copy()


class _Writer:
    """Appends to the files of a folder; `commit` makes it last."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files, self._committed = folder, {}, time.monotonic()
        self.progress = Progress.of(folder / PROGRESS)
        if "offsets.bin" not in self.progress.files:
            self._write("offsets.bin", np.zeros(1, dtype=np.int64))

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, block: Block) -> None:
        progress, offsets = self.progress, np.cumsum(block.lengths, dtype=np.int64)
        self._write("offsets.bin", offsets + progress.tokens)
        for name, array in {**block.per_token, **block.per_document}.items():
            self._write(f"{name}.bin", array)
        progress.read += block.read
        progress.documents += len(block.lengths)
        progress.tokens += int(block.lengths.sum())
        for name, numbers in block.totals.items():
            progress.totals[name] = progress.totals.get(name, 0) + int(numbers.sum())
        for one in block.unusable:
            progress.unusable.add(one.id, one.reason, one.detail)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def _write(self, name: str, array: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = self._opened(name)
        self._files[name].write(np.ascontiguousarray(array).data)
        self.progress.files[name] = self.progress.files.get(name, 0) + array.nbytes

    def _opened(self, name: str) -> IO[bytes]:
        file, size = (self.folder / name).open("ab"), self.progress.files.get(name, 0)
        file.truncate(size)
        return file

    def commit(self) -> None:
        """What is appended so far outlives a killed process and a machine that goes down."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_lasting(self.folder / PROGRESS, json.dumps(asdict(self.progress)))
        self._committed = time.monotonic()


def write_lasting(path: Path, text: str) -> None:
    """The whole file or none, on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def alone(folder: Path, say: Say) -> Iterator[None]:
    """The one process that writes into `folder`, which is made; others wait here until it is done or dead.

    One that has waited begins in a new and empty folder where the other has renamed or removed its own.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"tokens: waiting for another process that prepares {folder}")
                fcntl.flock(opened, fcntl.LOCK_EX)
            if folder.is_dir() and os.path.samestat(os.fstat(opened), folder.stat()):
                yield
                return
        finally:
            os.close(opened)


# ----- processes


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def mapped(work: Callable[[T], R], blocks: Iterator[tuple[T, Any]], processes: int) -> Iterator[tuple[R, Any]]:
    """``(work(block), what came with it)`` in order, a few blocks ahead; a single block needs no second process."""
    first = list(islice(blocks, 2))
    if processes == 1 or len(first) < 2 or sys.platform != "linux":
        for block, beside in _chained(first, blocks):
            yield work(block), beside
        return
    waiting: deque[tuple[Future[R], Any]] = deque()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(work, os.getpid()))
    try:
        for block, beside in _chained(first, blocks):
            waiting.append((pool.submit(_worked, block), beside))
            if len(waiting) > 2 * processes:
                future, told = waiting.popleft()
                yield future.result(), told
        for future, told in waiting:
            yield future.result(), told
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenises was killed, perhaps for want of memory (data.processes: fewer need less); what "
            "is done stands, and the same command goes on from there"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chained(first: Iterable[T], rest: Iterable[T]) -> Iterator[T]:
    yield from first
    yield from rest


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """In a new process: what it does; an interrupt is its parent's matter, and it does not outlive its parent."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _worked(block: Any) -> Any:
    assert _work is not None
    return _work(block)
