from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd.report.record import Run


@pytest.fixture(scope="session")
def whole(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happened to."""
    return tailkd.distill(running.small(stranger, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def recipe(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    return running.small(stranger, tmp_path / "run")


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk_of("4m")`` is a disk of that size; a disk of its own, since a read-only folder does not bind root."""
    disks: list[Path] = []

    def make(size: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)
