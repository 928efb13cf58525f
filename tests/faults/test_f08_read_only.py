"""F8, the store's part: a disk that turns read-only or vanishes during a run is an error that the next call raises."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import saving

from tailkd.train.checkpoint import Cursor


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, since a read-only folder does not bind root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def test_read_only_during_the_run(disk: Path) -> None:
    folder = saving.saved(disk / "checkpoints", steps=2)
    with saving.store(folder) as checkpoints:
        remount(disk, "ro")
        checkpoints.save(*saving.trained(3), Cursor(3))
        with pytest.raises(OSError, match=r"step 3 is not saved .*Read-only file system") as caught:
            checkpoints.wait()
        assert caught.value.errno == errno.EROFS
        remount(disk, "rw")
        saving.save(checkpoints, saving.trained(3), 3)
    saving.assert_goes_on_as_never_stopped(folder, at=3)


def test_read_only_at_the_start(disk: Path) -> None:
    remount(disk, "ro")
    with pytest.raises(OSError, match="Read-only file system"):
        saving.store(disk / "checkpoints")


def test_a_whole_checkpoint_is_read_from_a_read_only_disk(disk: Path) -> None:
    folder = saving.saved(disk / "checkpoints", steps=2)
    remount(disk, "ro")
    saving.assert_goes_on_as_never_stopped(folder, at=2)


def test_a_folder_that_vanishes_is_not_made_anew(tmp_path: Path) -> None:
    """It may be a disk that was taken away: what is under it is another disk."""
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    with saving.store(folder) as checkpoints:
        folder.rename(tmp_path / "elsewhere")
        checkpoints.save(*saving.trained(3), Cursor(3))
        with pytest.raises(FileNotFoundError, match="step 3 is not saved"):
            checkpoints.wait()
        assert not folder.exists()
        (tmp_path / "elsewhere").rename(folder)
        saving.save(checkpoints, saving.trained(3), 3)
    saving.assert_goes_on_as_never_stopped(folder, at=3)
