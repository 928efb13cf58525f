"""Bytes to and from the disk past the page cache, where the file system can.

That is a copy less for the processor, nothing that the system still has to write later, and what is read back is what
the disk holds. Where a file system cannot, the same calls go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BUFFER = 4 << 20  # bytes on their way; a multiple of every block size, and a map of its own begins at a page
DIRECT = getattr(os, "O_DIRECT", 0)


class Writer:
    """A new file; its bytes are on the disk after `sync`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._buffer, self._filled = memoryview(mmap.mmap(-1, BUFFER)), 0
        _turn(self._file, DIRECT)

    def write(self, data: memoryview) -> None:
        while data:
            taken = min(len(data), BUFFER - self._filled)
            self._buffer[self._filled : self._filled + taken] = data[:taken]
            self._filled, data = self._filled + taken, data[taken:]
            if self._filled == BUFFER:
                self._flush()

    def sync(self) -> None:
        if self._filled:
            _turn(self._file, 0)  # the rest is no whole number of blocks
            self._flush()
        os.fsync(self._file)

    def _flush(self) -> None:
        rest, self._filled = self._buffer[: self._filled], 0
        while rest:
            try:
                rest = rest[os.write(self._file, rest) :]
            except OSError as error:  # a file system that cannot after all, or an earlier write that was cut short
                if error.errno != errno.EINVAL or not _turn(self._file, 0):
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def pieces(file: int, *, past_cache: bool) -> Iterator[memoryview]:
    """What an open file holds, piece by piece, each valid until the next."""
    buffer = mmap.mmap(-1, BUFFER)
    if past_cache:
        _turn(file, DIRECT)
    view, read = memoryview(buffer), BUFFER
    while read == BUFFER:
        read = os.readv(file, [buffer])
        if read:
            yield view[:read]


def _turn(file: int, direct: Any) -> bool:
    """Let an open file go past the cache, or through it again; whether that changed anything."""
    was = fcntl.fcntl(file, fcntl.F_GETFL)
    wanted = (was & ~DIRECT) | direct
    if wanted != was:
        with suppress(OSError):  # EINVAL: this file system cannot
            fcntl.fcntl(file, fcntl.F_SETFL, wanted)
    return fcntl.fcntl(file, fcntl.F_GETFL) != was
