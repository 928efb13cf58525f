"""What a save costs: how long it holds the training thread, how long until it is on the disk, what training loses.

Run: python benchmarks/checkpoint.py [--out FILE] [--folder FOLDER]. Each figure is taken in pairs, turn about:

- `save_file`: safetensors' own writer on the same tensors, blocking, without fsync; `held`: our `save` until it
  returns; `total`: `save` and `wait`, with fsync, hashes and the reading back; `processor`: seconds of a core in that;
- blocks of 20 steps, with a save at the start that is written meanwhile, and without one: by the clock, which other
  work on the machine disturbs, and by processor time, which counts the writing thread as if no core were free.

Rows (median, 20th and 80th percentile of `repeats`) go to benchmarks/results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tailkd.train import tensors
from tailkd.train.checkpoint import Checkpoints, Cursor

RESULTS = Path(__file__).parent / "results" / "checkpoint.jsonl"
STEPS = 20
GOALS = {"held / save_file": 0.40, "loss of throughput": 0.03, "loss of processor time": 0.03}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Training:
    """A stack of square layers with AdamW: as many parameters as asked for, and a step whose length tokens set."""

    def __init__(self, parameters: int, tokens: int, width: int = 1024) -> None:
        torch.manual_seed(0)
        layers = round(parameters / width**2)
        self.model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.GELU())))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(tokens, width)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()

    def state(self) -> dict[str, torch.Tensor]:
        return {**tensors.weights(self.model), **tensors.moments(self.model, self.optimizer)}


def costs(training: Training, checkpoints: Checkpoints, folder: Path, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"save_file": [], "held": [], "total": [], "processor": [], "held / save_file": []}
    state = training.state()
    plain = folder / "plain.safetensors"
    for number in range(repeats + 1):
        blocking = seconds(lambda: save_file(state, plain))
        plain.unlink()
        os.sync()
        worked = time.process_time()
        held = seconds(partial(checkpoints.save, training.model, training.optimizer, Cursor(number)))
        total = held + seconds(checkpoints.wait)
        worked = time.process_time() - worked
        os.sync()
        if number == 0:
            print(f"first save, which allocates: held {held:.3f} s")
            continue
        for name, value in (("save_file", blocking), ("held", held), ("total", total), ("processor", worked)):
            times[name].append(value)
        times["held / save_file"].append(held / blocking)
    return times


def throughput(training: Training, checkpoints: Checkpoints, repeats: int) -> dict[str, list[float]]:
    names = ("20 steps", "20 steps and a save", "loss of throughput", "loss of processor time")
    times: dict[str, list[float]] = {name: [] for name in names}

    def with_save(number: int) -> None:
        checkpoints.save(training.model, training.optimizer, Cursor(1000 + number))
        training.steps()
        checkpoints.wait()

    for number in range(repeats):
        order = [("20 steps", training.steps), ("20 steps and a save", partial(with_save, number))]
        wall, worked = {}, {}
        for name, work in order if number % 2 else reversed(order):
            before = time.process_time()
            wall[name] = seconds(work)
            worked[name] = time.process_time() - before
            times[name].append(wall[name])
        times["loss of throughput"].append(1 - wall["20 steps"] / wall["20 steps and a save"])
        times["loss of processor time"].append(1 - worked["20 steps"] / worked["20 steps and a save"])
    return times


def check(training: Training, folder: Path) -> None:
    """What was saved last is what comes back; otherwise no figure counts."""
    again = Training(sum(p.numel() for p in training.model.parameters()), 1)
    checkpoints = Checkpoints(folder, identity={})
    before = {name: tensor.clone() for name, tensor in training.state().items()}
    checkpoints.save(training.model, training.optimizer, Cursor(10_000))
    checkpoints.wait()
    checkpoints.resume(again.model, again.optimizer)
    checkpoints.close()
    after = again.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="where to save; default a temporary folder")
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--tokens", type=int, default=256, help="rows of the batch; sets the length of a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=5, help="blocks of 20 steps with and without a save")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    training = Training(arguments.parameters, arguments.tokens)
    training.step()
    step = statistics.median(seconds(training.step) for _ in range(3))
    size = sum(tensor.nbytes for tensor in training.state().values())
    checkpoints = Checkpoints(folder / "checkpoints", identity={})
    try:
        times = costs(training, checkpoints, folder, arguments.repeats)
        times |= throughput(training, checkpoints, arguments.pairs)
        checkpoints.close()
        check(training, folder / "checkpoints")
    finally:
        shutil.rmtree(folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {"bytes": size, "step_s": round(step, 4), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    common |= {"torch": torch.__version__, "machine": platform.machine(), "commit": commit.stdout.strip()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        for name, values in times.items():
            low, *_, high = statistics.quantiles(values, n=5)
            middle = statistics.median(values)
            unit = "share" if name in GOALS else "s"
            row = {"what": name, "unit": unit, "p20": low, "p50": middle, "p80": high, "repeats": len(values), **common}
            file.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            goal = f"   goal < {GOALS[name]:.2f}" if name in GOALS else ""
            print(f"{name:>22}  p20 {low:.3f}  p50 {middle:.3f}  p80 {high:.3f} {unit}{goal}")


if __name__ == "__main__":
    main()
