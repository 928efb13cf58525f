"""F6: no space left, for real: a limit on the size of files, and a small disk."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import saving

from tailkd.train.checkpoint import Cursor


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    return disk_of("256k")


def assert_the_one_before_stands(folder: Path, step: int) -> None:
    assert all(name.startswith("step-") for name in saving.names(folder))
    saving.assert_goes_on_as_never_stopped(folder, at=step)


@pytest.mark.parametrize("size", [0, 100, 4_000])
def test_a_file_cannot_grow(tmp_path: Path, size: int) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    with saving.store(folder) as checkpoints:
        with small_files(size):
            checkpoints.save(*saving.trained(3), Cursor(3))
            with pytest.raises(OSError, match=r"step 3 is not saved .*bytes with spare.*File too large") as caught:
                checkpoints.wait()
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(folder))
        assert_the_one_before_stands(folder, 2)
        saving.save(checkpoints, saving.trained(3), 3)  # and with space again, all is well
    assert_the_one_before_stands(folder, 3)


def test_a_small_disk_is_seen_before_anything_is_written(small_disk: Path) -> None:
    folder = saving.saved(small_disk / "checkpoints", steps=2)
    with saving.store(folder) as checkpoints:
        checkpoints.save(*saving.trained(3, width=200), Cursor(3))
        message = r"step 3 is not saved .*: [\d,]+ bytes are needed and [\d,]+ are free; .*: '.*/checkpoints'"
        with pytest.raises(OSError, match=message) as caught:
            checkpoints.wait()
    assert caught.value.errno == errno.ENOSPC
    assert_the_one_before_stands(folder, 2)


def test_a_disk_that_fills_up_meanwhile(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saving.saved(small_disk / "checkpoints", steps=2)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch, saving.store(folder) as checkpoints:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 40))
        checkpoints.save(*saving.trained(3, width=200), Cursor(3))
        with pytest.raises(OSError, match=r"step 3 is not saved .*No space left on device") as caught:
            checkpoints.wait()
    assert caught.value.errno == errno.ENOSPC
    assert_the_one_before_stands(folder, 2)
