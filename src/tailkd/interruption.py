"""`tailkd demo --kill-and-resume`: a run killed without warning and started again ends where an unharmed one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tailkd.demo import SIZES, STUDENTS, corpus_of, shared_recipe, start_model
from tailkd.parts import Say
from tailkd.report.record import Run

TRAINING = {"tokens": 24_000, "batch_size": 4, "learning_rate": 4e-3, "save_every_tokens": 4_000}
EVALUATION = {"tokens": 4_000, "every_tokens": 8_000}


def show(out: Path, say: Say, *, kills: int = 3) -> bool:
    """Train once in peace and once killed `kills` times; whether every weight of both students is the same bits."""
    corpus = corpus_of(out / "corpus.jsonl")
    starts = {name: start_model(out / f"{name}-start", corpus, sizes) for name, sizes in SIZES.items()}
    runs = {}
    for name, times in (("in-peace", 0), ("killed", kills)):
        recipe = {
            **shared_recipe(out, corpus, name),
            "teacher": {"model": str(starts["teacher"])},
            "student": {"model": str(starts["student"])},
            "objective": STUDENTS["tad"],
            "training": TRAINING,
            "evaluate": EVALUATION,
        }
        runs[name] = _train(recipe, times, say)
    students = [load_file(run.student / "model.safetensors") for run in runs.values()]
    losses = [[r["loss"] for r in run.metrics if r["kind"] == "step"] for run in runs.values()]
    same = losses[0] == losses[1] and all(torch.equal(students[0][name], students[1][name]) for name in students[1])
    say(
        f"{len(losses[0])} losses and {sum(t.numel() for t in students[0].values()):,} weights of both runs are "
        + ("the same, bit for bit" if same else "NOT the same")
    )
    return same


def _train(recipe: dict[str, Any], kills: int, say: Say) -> Run:
    """Run the command as often as it takes, killing it after each new checkpoint while kills are left."""
    folder = Path(recipe["out"])
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=1) + "\n")
    command, fresh = [sys.executable, "-m", "tailkd", "distill", str(file)], ["--fresh"]
    for killed in range(kills + 1):
        process = subprocess.Popen([*command, *fresh], stdout=subprocess.DEVNULL)
        if killed < kills and _new_checkpoint(folder, process, fresh=bool(fresh)):
            process.send_signal(signal.SIGKILL)
            say(f"killed process {process.pid} (SIGKILL) after its last checkpoint; the same command again")
        fresh = []
        if process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return Run(folder)


def _new_checkpoint(folder: Path, process: subprocess.Popen[bytes], *, fresh: bool) -> bool:
    """Wait until the process has saved a step that was not there; False where it ends before."""
    before = None if fresh else _newest(folder)
    seen_empty = not fresh
    while process.poll() is None:
        newest = _newest(folder)
        seen_empty = seen_empty or newest is None
        if seen_empty and newest not in (None, before):
            return True
        time.sleep(0.05)
    return False


def _newest(folder: Path) -> str | None:
    return max((path.name for path in (folder / "checkpoints").glob("step-*")), default=None)
