"""Long work on rows, cut into chunks: shared out among processes, each chunk a file that is whole or not there."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from tailkd.fault import at

LOCK = "lock"
TEMPORARY = ".tmp-*"
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


def shared_out(
    chunks: Sequence[T],
    make: Callable[[T], None],
    *,
    ranks: Ranks,
    heed: Callable[[], None],
    made: Callable[[int], None],
) -> None:
    """Every chunk by one of the ranks, a round at a time.

    Args:
        heed: called before each round, on all ranks equally often, and may raise to stop.
        made: told after each round how many chunks that makes.
    """
    for start in range(0, len(chunks), ranks.world):
        heed()
        for own in chunks[start + ranks.rank : start + ranks.rank + 1]:
            make(own)
        made(min(start + ranks.world, len(chunks)))


def write_whole(path: Path, pieces: Iterable[bytes], *, point: str) -> None:
    """A file under a name of its own, on the disk, and only then under its name; `point` names it for `fault.at`."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
                at(f"{point}:middle")
            file.flush()
            os.fsync(file.fileno())
        at(f"{point}:before")
        temporary.replace(path)
        at(f"{point}:after")
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """What a process that died left behind; under the lock of `alone`."""
    for left in folder.rglob(TEMPORARY):
        left.unlink()


@contextmanager
def alone(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run makes the same; one that died holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{what}: another process makes the same in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
