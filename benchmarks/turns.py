"""Competitors that take turns in random order, what their times come to, and under which circumstances."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COMMIT = ["git", "describe", "--always", "--dirty"]
CLOCK, PROCESSORS = 0, 1

Row = dict[str, Any]
Work = dict[str, Callable[[], object]]
Times = dict[str, list[tuple[float, float]]]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of all processors together."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, worked = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - worked


def taken(work: Work, repeats: int) -> Times:
    """Seconds of every turn. The order differs from round to round: who comes after whom changes what a card does."""
    times: Times = {name: [] for name in work}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(work), len(work)):
            times[name].append(seconds(work[name]))
    return times


def ratios(times: Times, name: str, floor: str) -> Row:
    """Medians of the ratios within a round, in which the rest of the machine does about the same."""
    rounds = list(zip(times[name], times[floor], strict=True))
    kinds = {"ratio": CLOCK, "processor_ratio": PROCESSORS}
    return {key: statistics.median(one[kind] / other[kind] for one, other in rounds) for key, kind in kinds.items()}


def fifths(values: list[float]) -> Row:
    cuts = statistics.quantiles(values * (2 if len(values) == 1 else 1), n=5, method="inclusive")
    return {"p20_s": cuts[0], "p50_s": statistics.median(values), "p80_s": cuts[3]}


def circumstances() -> Row:
    on_gpu = torch.cuda.is_available()
    commit = subprocess.run(COMMIT, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
    }


def append(path: Path, row: Row) -> None:
    """A line more, numbers to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole) + "\n")
