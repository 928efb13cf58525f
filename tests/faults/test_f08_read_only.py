"""F8: a disk that turns read-only or vanishes: an error of the store's next call, code 78 of a whole run."""

from __future__ import annotations

import errno
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import builders
import pytest
import running
import saving

import tailkd
from tailkd import run as way
from tailkd.errors import DataError, Refusal
from tailkd.report.record import Run
from tailkd.train.checkpoint import Cursor


@pytest.fixture
def disk(disk_of: Callable[[str], Path]) -> Path:
    return disk_of("4m")


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


# ----- whole runs: open files keep a disk from being remounted, so the folder is covered by a read-only view of itself


def cover(folder: Path) -> None:
    """From now on whoever opens something in the folder by its name finds it read-only."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


@contextmanager
def uncovered_at_last(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def cover_after(checkpoint: Path) -> None:
    """Called inside the run that trains."""
    until = time.monotonic() + 30
    while not checkpoint.is_dir() and time.monotonic() < until:
        time.sleep(0.01)
    cover(checkpoint.parents[1])


DISTILL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import running
from faults import test_f08_read_only as faults
from tailkd import cli
from tailkd.models.head import SplitModel
checkpoint = Path(json.loads(Path(sys.argv[1]).read_text())["out"]) / "checkpoints" / "step-000000003"
SplitModel.__call__ = running.on_call(31, lambda: faults.cover_after(checkpoint))
sys.argv = ["tailkd", "distill", sys.argv[1]]
cli.main()
"""


def test_a_whole_run(recipe: dict[str, Any], whole: Run, disk: Path, tmp_path: Path) -> None:
    """Read-only in the 4th step: three saves fail, said each; then one message and code 78, and it can go on."""
    folder = disk / "run"
    recipe["out"] = str(folder)
    recipe["training"]["save_every_tokens"] = 8 * 24
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with uncovered_at_last(folder):
        tests = Path(running.__file__).parent
        done = builders.fresh_python(DISTILL, str(tmp_path / "recipe.yaml"), str(tests), check=False)
        assert done.returncode == 78, done.stderr
        assert "Traceback" not in done.stderr
        for step in (4, 5, 6):
            assert f"a checkpoint could not be written: [Errno 30] step {step} is not saved" in done.stderr
        message = done.stderr.splitlines()[-1]
        assert message.startswith("tailkd: 3 checkpoints could not be written, the last: ")
        assert message.endswith("make room and run the same command")
        assert [name for name in saving.names(folder / "checkpoints") if "step-" in name][-1] == "step-000000003"
        with pytest.raises(Refusal, match=r"cannot be written \(Read-only file system\)"):
            tailkd.distill(recipe)
    running.assert_same(tailkd.distill(recipe), whole)


@pytest.mark.parametrize("when", ["_samples", "_measures_before"])
def test_outside_training(
    recipe: dict[str, Any], whole: Run, disk: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-only while the first measures or the trained student are to be written."""
    folder, real = disk / "run", way.__dict__[when]
    recipe["out"] = str(folder)
    with uncovered_at_last(folder), monkeypatch.context() as patch:

        def covered(*arguments: Any) -> Any:
            cover(folder)
            return real(*arguments)

        patch.setattr(way, when, covered)
        with pytest.raises(DataError, match=r"run cannot be written any more \(.*Read-only file system.*what is saved"):
            tailkd.distill(recipe)
    running.assert_same(tailkd.distill(recipe), whole)
