"""The objective beside its lower bound and its rivals: one run, interleaved, medians, behind a correctness gate.

Bare products (teacher logits, student logits, dh, dW) are 1.0. Run on one thread:
python benchmarks/objective.py [--shape cpu|qwen|gemma] [--dtype float32] [--repeats 5].
Appends rows to benchmarks/results/objective.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailkd.objective import Head, Objective, distillation_loss
from tailkd.objective.divergences import tail_aware_divergence

RESULTS = Path(__file__).parent / "results" / "objective.jsonl"
SHAPES = {  # rows, sequence, vocabulary, student width, teacher width
    "cpu": (4, 256, 32_000, 512, 768),
    "qwen": (8, 2_048, 151_936, 1_536, 2_048),
    "gemma": (2, 2_048, 256_000, 3_584, 3_584),
}
OURS = ("tail_aware", "forward_kl", "reverse_kl", "jensen_shannon", "none")

Step = Callable[[], Any]


class Case:
    """Inputs of one shape and dtype, and every competitor as a step that leaves gradients in hidden and weight."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        rows, length, vocabulary, narrow, wide = SHAPES[shape]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

        self.hidden = normal(rows, length, narrow).requires_grad_()
        self.weight = normal(vocabulary, narrow, scale=2 / narrow**0.5).requires_grad_()
        self.teacher = Head(normal(rows, length, wide), normal(vocabulary, wide, scale=3 / wide**0.5))
        self.labels = torch.randint(vocabulary, (rows, length), generator=generator, device=device)

    def products(self) -> None:
        """The four matrix products that no implementation can do without."""
        hidden, weight = self.hidden.detach().flatten(0, 1), self.weight.detach()
        teacher = self.teacher.hidden.flatten(0, 1) @ self.teacher.weight.T
        student = hidden @ weight.T
        del teacher
        _ = student @ weight
        _ = student.T @ hidden

    def ours(self, divergence: str, impl: str = "auto") -> None:
        head, objective = Head(self.hidden, self.weight), Objective(divergence=divergence)
        teacher = None if divergence == "none" else self.teacher
        distillation_loss(head, teacher, self.labels, objective=objective, impl=impl).mean().backward()

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = self.teacher.logits()
        return F.linear(self.hidden, self.weight), teacher

    def eager_tad(self) -> None:
        student, teacher = self.logits()
        clm = F.cross_entropy(student.float().flatten(0, 1), self.labels.flatten(), reduction="sum")
        ((clm + tail_aware_divergence(student, teacher).sum()) / self.labels.numel()).backward()

    def eager_kl(self) -> None:
        student, teacher = self.logits()
        log_q, log_p = student.float().log_softmax(-1).flatten(0, 1), teacher.float().log_softmax(-1).flatten(0, 1)
        clm = F.nll_loss(log_q, self.labels.flatten(), reduction="sum")
        ((clm + F.kl_div(log_q, log_p, log_target=True, reduction="sum")) / self.labels.numel()).backward()

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        self.hidden.grad = self.weight.grad = None
        step()
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad


def competitors(case: Case) -> dict[str, Step]:
    found: dict[str, Step] = {"bare products": case.products}
    found |= {f"tailkd {name}": lambda name=name: case.ours(name) for name in OURS}
    found |= {"eager TAD": case.eager_tad, "eager F.kl_div": case.eager_kl}
    return found


def measure(steps: dict[str, Step], case: Case, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            case.hidden.grad = case.weight.grad = None
            started = time.perf_counter()
            step()
            if case.hidden.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return times


def gate(case: Case) -> None:
    """Refuse to time a loss that is wrong: TAD against the oracle on the same inputs."""
    for ours, theirs in zip(
        case.gradients(lambda: case.ours("tail_aware")),
        case.gradients(lambda: case.ours("tail_aware", "reference")),
        strict=True,
    ):
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error < (2e-2 if ours.dtype == torch.bfloat16 else 1e-4), f"wrong by {error:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, 1 thread",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "commit": commit.stdout.strip(),
        "repeats": arguments.repeats,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        case = Case(arguments.shape, getattr(torch, dtype), device)
        gate(case)
        times = measure(competitors(case), case, arguments.repeats)
        bound = statistics.median(times["bare products"])
        with RESULTS.open("a") as file:
            for name, values in times.items():
                fifths = statistics.quantiles(values, n=5)
                row = {"what": name, "dtype": dtype, "p20_s": fifths[0], "p50_s": statistics.median(values)}
                row |= {"p80_s": fifths[3], "ratio": statistics.median(values) / bound, **about}
                rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                file.write(json.dumps(rounded) + "\n")
                print(f"{dtype:>9}  {name:<24} {row['p50_s']:7.3f} s  {row['ratio']:5.2f} x bare products", flush=True)


if __name__ == "__main__":
    main()
