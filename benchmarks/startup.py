"""Seconds until a verb answers, as whole processes: medians of several runs, beside the cost of importing torch alone.

Run: python benchmarks/startup.py [--repeats 7]. Appends rows to benchmarks/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.jsonl"
BAD_RECIPE = "teacher: {model: a/b}\nlearning_rat: 1\n"


def seconds(command: list[str], expected: int) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == expected, done.stderr.decode()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(BAD_RECIPE)
        python, tailkd = [sys.executable, "-c"], [sys.executable, "-m", "tailkd"]
        commands = {
            "python alone": ([*python, "pass"], 0),
            "tailkd --help": ([*tailkd, "--help"], 0),
            "refused recipe": ([*tailkd, "distill", str(recipe)], 2),
            "import torch": ([*python, "import torch"], 0),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, (command, expected) in commands.items():
                times[name].append(seconds(command, expected))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for name, values in times.items():
            low, middle, high = (
                statistics.quantiles(values, n=5)[0],
                statistics.median(values),
                statistics.quantiles(values, n=5)[3],
            )
            row = {"what": name, "p20_s": low, "p50_s": middle, "p80_s": high, "repeats": repeats}
            row |= {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
            file.write(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            print(f"{name:>16}  p20 {low:.2f} s  p50 {middle:.2f} s  p80 {high:.2f} s")


if __name__ == "__main__":
    main()
