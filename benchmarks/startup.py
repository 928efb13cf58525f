"""Seconds until the command answers, as whole processes in random order: medians of several runs.

`--help` and a refused recipe beside importing torch alone; the first step of `distill` on a prepared corpus beside
importing torch and transformers and loading both models (11 and 32 M parameters, 32,000 ids), which it cannot do
without. Before its first step `distill` also measures both models on a row of 64 held-out tokens.
Run: python benchmarks/startup.py [--repeats 7], with OMP_WAIT_POLICY=passive where other work runs. Appends rows to
benchmarks/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import data
import torch
import turns
import whole_step

RESULTS = Path(__file__).parent / "results" / "startup.jsonl"
BAD_RECIPE = "teacher: {model: a/b}\nlearning_rat: 1\n"
LOADING, FIRST_STEP = "importing and loading both models", "distill, to its first step"
GOALS = {"tailkd --help": 0.7, "refused recipe": 2.0}  # seconds
ROW = 64  # tokens; of one such row both models are measured before the first step
FIRST_STEP_GOAL = 1.3  # of importing and loading
LOAD = """
import os, sys, torch, transformers
models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:]]
os._exit(0)  # as the command below: the end of a process is no part of its start
"""
# Imports first what the command imports anyway.
DISTILL = """
import os, sys
from tailkd.cli import main
from tailkd.train.step import Step
Step.__call__ = lambda *_: os._exit(0)
sys.argv[0] = "tailkd"
main()
"""


def seconds(command: list[str], expected: int) -> tuple[float, float]:
    """Of a whole process, by the clock and of all processors."""
    started, before = time.perf_counter(), children_seconds()
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == expected, done.stderr.decode()
    return time.perf_counter() - started, children_seconds() - before


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_pair(folder: Path, shape: str) -> Path:
    """A corpus, a tokenizer, both models and a recipe that trains one by the other; tokens are cached there too."""
    os.environ["TAILKD_CACHE"] = str(folder / "cache")
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    data.write_text(corpus, 1_000_000)
    configurations = {
        role: whole_step.configuration(getattr(whole_step.SHAPES[shape], role)) for role in ("student", "teacher")
    }
    data.write_tokenizer(tokenizer, corpus, configurations["student"].vocab_size)
    for role, configuration in configurations.items():
        whole_step.model_of(configuration, torch.float32, torch.device("cpu"), False).save_pretrained(folder / role)
        for file in tokenizer.iterdir():
            (folder / role / file.name).write_bytes(file.read_bytes())
    recipe: dict[str, Any] = {
        "out": str(folder / "run"),
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "data": {"train": {"path": str(corpus)}, "context": ROW},
        "training": {"tokens": 4096, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-5},
        "evaluate": {"tokens": ROW},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def commands(folder: Path, shape: str) -> dict[str, tuple[list[str], int]]:
    """Each with the exit code that it must have."""
    bad = folder / "bad.yaml"
    bad.write_text(BAD_RECIPE)
    python, tailkd = [sys.executable, "-c"], [sys.executable, "-m", "tailkd"]
    recipe = write_pair(folder, shape)
    return {
        "python alone": ([*python, "pass"], 0),
        "tailkd --help": ([*tailkd, "--help"], 0),
        "refused recipe": ([*tailkd, "distill", str(bad)], 2),
        "import torch": ([*python, "import torch"], 0),
        LOADING: ([*python, LOAD, str(folder / "teacher"), str(folder / "student")], 0),
        FIRST_STEP: ([*python, DISTILL, "distill", str(recipe), "--fresh"], 0),
    }


def measured(folder: Path, shape: str, repeats: int) -> list[turns.Row]:
    found = commands(folder, shape)
    seconds(*found[FIRST_STEP])  # prepares the corpus
    times: turns.Times = {name: [] for name in found}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(found), len(found)):
            times[name].append(seconds(*found[name]))
    rows = [
        {
            "what": name,
            **turns.fifths([wall for wall, _ in values]),
            "processor_s": median(worked for _, worked in values),
        }
        for name, values in times.items()
    ]
    rows[-1] |= turns.ratios(times, FIRST_STEP, LOADING)
    return rows


def missed(rows: list[turns.Row]) -> list[str]:
    late = [row["what"] for row in rows if row["p50_s"] > GOALS.get(row["what"], float("inf"))]
    return late + [
        row["what"] for row in rows if min(row.get("ratio", 0.0), row.get("processor_ratio", 0.0)) > FIRST_STEP_GOAL
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shape", choices=whole_step.SHAPES, default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    about = turns.circumstances() | {"repeats": arguments.repeats, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), arguments.shape, arguments.repeats)
    for row in rows:
        turns.append(arguments.out, row | about)
        ratio = ""
        if "ratio" in row:
            ratio = f"  {row['ratio']:.2f} x {LOADING} ({row['processor_ratio']:.2f} of processors)"
        print(f"{row['what']:>33}  p20 {row['p20_s']:.2f}  p50 {row['p50_s']:.2f}  p80 {row['p80_s']:.2f} s{ratio}")
    print("goals missed: " + ", ".join(missed(rows)) if missed(rows) else "all goals met")


if __name__ == "__main__":
    main()
