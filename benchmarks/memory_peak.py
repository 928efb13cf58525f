"""How far the resident memory of a CPU process grows in a step, for step.py and objective.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def growth(work: Callable[[], object]) -> int:
    """Bytes above what is held before."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = highest()
    work()
    return highest() - before


def in_process(script: str, words: list[str]) -> int | None:
    """What a fresh process of a script prints last, in bytes; None, and a line of why, where it fails."""
    # A fixed threshold: glibc otherwise learns to keep large freed blocks, and peaks would depend on chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        print(f"no memory figure ({' '.join(words)}): {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return None
    return int(done.stdout.split()[-1])
