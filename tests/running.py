"""Whole runs for tests of faults: a small recipe, runs as processes, and what two runs must share to the last bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from tailkd.models.head import SplitModel
from tailkd.report.record import Run


def small(stranger: SimpleNamespace, out: Path, **training: Any) -> dict[str, Any]:
    """12 steps of 8 rows in two micro-batches, evaluated every 4 steps, saved every 3."""
    values = {
        "tokens": 12 * 8 * 24,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "seed": 3,
        "save_every_tokens": 3 * 8 * 24,
        **training,
    }
    return {
        "name": "faults",
        "out": str(out),
        "teacher": {"model": str(stranger.teacher)},
        "student": {"model": str(stranger.student)},
        "data": {"train": {"path": str(stranger.corpus), "text": "body"}, "context": 24},
        "objective": {"divergence": "tail_aware", "top_k": 5},
        "training": values,
        "evaluate": {"tokens": 400, "every_tokens": 4 * 8 * 24, "batch_size": 4},
    }


def long(stranger: SimpleNamespace, out: Path, **training: Any) -> dict[str, Any]:
    """60 steps, saved every 20."""
    return small(stranger, out, **{"tokens": 60 * 8 * 24, "save_every_tokens": 20 * 8 * 24, **training})


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run has written down so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def wait_for_steps(folder: Path, number: int) -> None:
    until = time.monotonic() + 120
    while len(records(folder)) < number:
        assert time.monotonic() < until
        time.sleep(0.05)


def steps(run: Run) -> list[tuple[Any, ...]]:
    """What a step's record must repeat exactly: number, samples, loss as a hexadecimal float, gradient norm."""
    return [
        (r["step"], *r["samples"], r["loss"].hex(), r["gradient_norm"].hex())
        for r in run.metrics
        if r["kind"] == "step"
    ]


def state(run: Run) -> dict[str, torch.Tensor]:
    """Student and newest checkpoint: weights and moments."""
    newest = max((run.folder / "checkpoints").glob("step-*"))
    files = [*sorted(newest.glob("*.safetensors")), run.student / "model.safetensors"]
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def assert_same(run: Run, other: Run) -> None:
    """Losses, samples, evaluations, weights and optimizer state are equal to the last bit."""
    assert steps(run) == steps(other)
    assert run.evaluation == other.evaluation
    measured = [[(r["step"], r["cross_entropy"]) for r in one.evaluations()] for one in (run, other)]
    assert measured[0] == measured[1]
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def on_call(number: int, action: Callable[[], None]) -> Callable[..., Any]:
    """A forward pass for `SplitModel.__call__` that acts before its `number`-th call (teacher and student count)."""
    real, calls = SplitModel.__call__, 0

    def call(split: SplitModel, *inputs: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return real(split, *inputs)

    return call


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def start(
    recipe: dict[str, Any],
    *arguments: str,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    verb: str = "distill",
) -> subprocess.Popen[str]:
    """``tailkd distill`` as a process of its own; under torchrun where there is more than one rank."""
    file = Path(recipe["out"]).parent / "recipe.json.yaml"
    file.write_text(json.dumps(recipe))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tailkd", verb, str(file), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def start_by_hand(command: list[str], *, ranks: int = 2, timeout: float = 600) -> list[subprocess.Popen[str]]:
    """A Python command as the processes of one run, without torchrun, which would end them all when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    variables = {**os.environ, **address, "OMP_NUM_THREADS": "1", "TAILKD_TIMEOUT": str(timeout)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stderr=subprocess.PIPE,
            text=True,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def run_file(file: str, folder: Path, *, ranks: int = 2) -> None:
    """Run a test's own file as ``__rank__`` in the processes of one run; all must end well."""
    code = f"import json, runpy, sys; sys.path[:] = json.loads({json.dumps(sys.path)!r}); "
    code += f"runpy.run_path({file!r}, run_name='__rank__')"
    processes = start_by_hand(["-c", code, str(folder)], ranks=ranks)
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
