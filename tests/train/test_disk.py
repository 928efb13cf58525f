"""Files past the page cache: every size, every file system, every way to be refused."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tailkd.train import commit, disk

SIZES = (0, 1, 4095, 4096, 4097, disk.BUFFER - 1, disk.BUFFER, disk.BUFFER + 5, 2 * disk.BUFFER)
PLACES = [None, *(["/dev/shm"] if os.access("/dev/shm", os.W_OK) else [])]


def written(path: Path, content: bytes, piece: int = 1_000_003) -> bytes:
    with disk.Writer(path) as file:
        for start in range(0, len(content), piece):
            file.write(memoryview(content)[start : start + piece])
        file.sync()
    return path.read_bytes()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_there(place: str | None, direct: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not direct:
        monkeypatch.setattr(disk, "DIRECT", 0)
    folder = Path(place or tmp_path)
    for size in SIZES:
        path, content = folder / f"{os.getpid()}-{size}", os.urandom(size)
        try:
            assert written(path, content) == content
            for past_cache in (True, False):
                expected = commit.Written(size, xxhash.xxh3_128_hexdigest(content))
                assert commit.measure(path, past_cache=past_cache) == expected
        finally:
            path.unlink()


def test_the_cache_is_passed_by_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    try:
        os.close(os.open(tmp_path / "plain", os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system always goes through the cache")
    with disk.Writer(tmp_path / "file") as file:
        assert fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT


def test_a_file_system_that_refuses_late_and_writes_that_are_cut_short(tmp_path: Path, monkeypatch: Any) -> None:
    plain, calls = os.write, []

    def odd(file: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "not here")
        return plain(file, data[: max(1, len(data) // 3)])

    monkeypatch.setattr(os, "write", odd)
    content = os.urandom(disk.BUFFER + 77)
    assert written(tmp_path / "file", content) == content


def test_a_write_that_fails_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", b"content")


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        disk.Writer(tmp_path / "file")
