"""A whole training step beside its floor: one run, interleaved, medians.

The floor is the teacher's backbone forward, the student's backbone forward and backward, the four bare products of the
loss and a bare AdamW, nothing else. Run: python benchmarks/step.py [--shape cpu|qwen|gemma] [--dtype bfloat16]
[--compile] [--rows 8] [--repeats 5] [--profile FILE]. Appends rows to benchmarks/results/step.jsonl;
--table writes them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.ledger import Batch as Micro
from tailkd.ledger import Student, Teacher, Training, memory, stages
from tailkd.ledger.published import config
from tailkd.models import precision
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.teacher.live import LiveTeacher
from tailkd.train.optim import build_optimizer
from tailkd.train.step import Step

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step.jsonl"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- steps: begin, written by benchmarks/step.py --table -->", "<!-- steps: end -->")
FLOOR = "floor"
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
COMMIT = ["git", "rev-parse", "--short", "HEAD"]
MATRIX = {"cpu": 2048, "cuda": 8192}  # of the product that tells what the device can do
PER_MILLION = 1e9  # operations per token in a PFLOP per million tokens

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Names in `ledger.published`, or sizes of two Llamas."""

    student: Any
    teacher: Any
    context: int
    rows: int


SHAPES = {
    "cpu": Shape((32_000, 256, 704, 4, 4), (32_000, 512, 1376, 5, 8), 256, 4),
    "qwen": Shape("Qwen 1.2B", "Qwen1.5-1.8B", 2048, 8),
    "gemma": Shape("Gemma2 2B", "Gemma2-9B", 2048, 2),
    "tiny": Shape((500, 32, 64, 2, 2), (500, 48, 96, 2, 2), 32, 2),  # for the tests
}


def configuration(of: Any) -> Any:
    if isinstance(of, str):
        return config(of)
    from transformers import LlamaConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaConfig(**dict(zip(names, of, strict=True)))


def model_of(configuration: Any, dtype: torch.dtype, device: torch.device, compiled: bool) -> Any:
    """A model with random weights, each block compiled where asked."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    for block in model.model.layers if compiled else ():
        block.compile()
    return model


class Bench:
    """Both models and a batch; every competitor is a step over them."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.shape, self.device = SHAPES[arguments.shape], device
        self.dtype = getattr(torch, arguments.dtype)
        self.rows = arguments.rows or self.shape.rows
        self.configurations = configuration(self.shape.student), configuration(self.shape.teacher)
        student = model_of(self.configurations[0], torch.float32, device, arguments.compile).train()
        if arguments.checkpointing:
            student.gradient_checkpointing_enable()
        self.checkpointing = arguments.checkpointing
        teacher = model_of(self.configurations[1], self.dtype, device, arguments.compile)
        self.vocabulary = self.configurations[0].vocab_size
        self.student = SplitModel(student, compute_dtype=self.dtype)
        self.teacher = LiveTeacher(teacher, usable=self.vocabulary, compute_dtype=self.dtype)
        self.optimizer = build_optimizer(student, **OPTIMIZER)
        self.batch = self._batch()
        torch.manual_seed(1)
        self.direction = torch.randn(self.rows, self.shape.context, student.config.hidden_size, device=device)

    def _batch(self) -> Batch:
        rows, context = self.rows, self.shape.context
        ids = torch.randint(3, self.vocabulary, (rows, context + 1), generator=torch.Generator().manual_seed(0))
        borders = tuple(range(0, rows * context + 1, context))
        segments, valid = torch.zeros(rows, context, dtype=torch.int32), torch.arange(rows * context)
        return Batch(ids[:, :-1], ids[:, 1:], segments, valid, borders, borders, len(valid), tuple(range(rows)))

    def ours(self, objective: Objective) -> Callable[[], None]:
        step = Step(self.student, self.teacher, objective, self.optimizer, micro_batch_size=self.rows, clip_norm=1.0)

        def run() -> None:
            assert step(self.batch).not_finite is None

        return run

    def floor(self) -> None:
        ids = self.batch.input_ids.to(self.device)
        with precision.compute(self.dtype, self.device):
            with torch.inference_mode():
                theirs = self.teacher.split.backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden = self.student.backbone(input_ids=ids, use_cache=False).last_hidden_state
        weight = self.student.projection.weight
        with torch.no_grad():
            along, gradient = self._products(theirs, hidden.detach().flatten(0, 1), weight)
        hidden.backward(self.direction.to(hidden.dtype) + 0 * along.view_as(hidden))
        weight.grad = gradient.to(weight.dtype) if weight.grad is None else weight.grad + gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _products(self, theirs: Tensor, ours: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        narrow, ours = weight.to(self.dtype), ours.to(self.dtype)
        teacher = theirs.to(self.dtype) @ self.teacher.split.projection.weight.to(self.dtype).T
        student = ours @ narrow.T
        del teacher
        return student @ narrow, student.T @ ours

    def operations(self) -> float:
        """Executed operations of a step, from the ledger."""
        batch = Micro(self.rows, self.shape.context, checkpointing=self.checkpointing)
        student, teacher = self.configurations
        found = stages(Student(student), Teacher(teacher), Training(1.0, batch), None)
        return found.total * PER_MILLION * self.batch.count

    def predicted_bytes(self) -> int:
        batch = Micro(
            self.rows,
            self.shape.context,
            compute=self.dtype,
            checkpointing=self.checkpointing,
            device=self.device.type,
        )
        student, teacher = self.configurations
        return memory(student, [Teacher(teacher, self.dtype)], batch).total


def seconds(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large product of random numbers, median of ten."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    work: Callable[[], Any] = lambda: left @ right  # noqa: E731
    seconds(work)
    return 2 * size**3 / statistics.median(seconds(work) for _ in range(10))


def measured(bench: Bench, repeats: int) -> list[Row]:
    """A row per competitor; they take turns after one turn to warm up."""
    work = {
        FLOOR: bench.floor,
        "tailkd tail_aware": bench.ours(Objective()),
        "tailkd forward_kl": bench.ours(Objective(divergence="forward_kl")),
    }
    peaks = {name: peak_bytes(one) for name, one in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, one in work.items():
            times[name].append(seconds(one))
    floor = statistics.median(times[FLOOR])
    peak, operations = matrix_peak(bench.dtype, bench.device), bench.operations()
    rows: list[Row] = []
    for name, found in times.items():
        fifths = statistics.quantiles(found * (2 if repeats == 1 else 1), n=5, method="inclusive")
        middle = statistics.median(found)
        row: Row = {"what": name, "p20_s": fifths[0], "p50_s": middle, "p80_s": fifths[3], "ratio": middle / floor}
        row |= {"tokens_per_second": bench.batch.count / middle, "peak_bytes": peaks[name]}
        row |= {"utilisation": operations / middle / peak, "matrix_peak": peak}
        rows.append(row | {"predicted_bytes": None if name == FLOOR else bench.predicted_bytes()})
    return rows


def peak_bytes(work: Callable[[], None]) -> int | None:
    """The most that torch holds on the GPU during a step, models and optimizer included; the step has run before."""
    work()
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def profiled(work: Callable[[], None], path: Path) -> None:
    """The 15 kernels (operators, on a CPU) that a step spends most time in, as a table."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        seconds(work)
    column = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=column, row_limit=15, max_name_column_width=70))


def write_table() -> None:
    """Put the newest rows of each shape, precision, way and device between the two marks of the page."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    keys = ("shape", "rows", "context", "dtype", "compile", "checkpointing", "device")
    newest: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        group = newest.setdefault(tuple(row[key] for key in keys), [])
        if group and group[-1]["run"] != row["run"]:
            group.clear()
        group.append(row)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    lines = [line for group in newest.values() for line in section(group)]
    PAGE.write_text(before + "\n".join([MARKS[0], "", *lines, MARKS[1]]) + after, encoding="utf-8")


def section(rows: list[Row]) -> list[str]:
    about = rows[0]
    way = ", blocks compiled" * about["compile"] + ", activations checkpointed" * about["checkpointing"]
    size = f"{about['rows']} x {about['context']:,} tokens, {about['dtype']}"
    versions = f"torch {about['torch']}, python {about['python']}, commit {about['commit']}"
    lines = [
        f"### {about['shape']}: {size}{way}, {about['device']}",
        "",
        f"{versions}; {about['repeats']} repeats; a large product reaches {about['matrix_peak'] / 1e12:,.2f} TFLOP/s.",
        "",
        "| | p20 s | p50 s | p80 s | x floor | tokens/s | of the peak | peak GB | bill GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["what"], *(f"{row[name]:.4g}" for name in ("p20_s", "p50_s", "p80_s")), f"{row['ratio']:.2f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['utilisation']:.1%}"]
        cells += ["–" if row[name] is None else f"{row[name] / 1e9:.2f}" for name in ("peak_bytes", "predicted_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, help="of a micro-batch, which is the whole batch here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of the student")
    parser.add_argument("--profile", type=Path, help="write the 15 longest kernels of a step of TAD here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the rows into the page, measure nothing")
    arguments = parser.parse_args(words)
    if arguments.table:
        return write_table()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and arguments.shape in ("qwen", "gemma"):
        sys.exit(f"the shape {arguments.shape} wants a GPU, and there is none")
    torch.manual_seed(0)
    bench = Bench(arguments, device)
    about = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: getattr(arguments, name) for name in ("shape", "dtype", "compile", "checkpointing", "repeats")},
        "rows": bench.rows,
        "context": bench.shape.context,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": subprocess.run(COMMIT, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip(),
        "python": platform.python_version(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for row in measured(bench, arguments.repeats):
        whole = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in (row | about).items()}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        print(spoken(row), flush=True)
    if arguments.profile:
        profiled(bench.ours(Objective()), arguments.profile)
    return None


def spoken(row: Row) -> str:
    peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.2f} GB"
    predicted = "" if not peak or row["predicted_bytes"] is None else f" (bill {row['predicted_bytes'] / 1e9:6.2f})"
    used = f"{row['utilisation']:6.1%} of {row['matrix_peak'] / 1e12:,.2f} TFLOP/s"
    speed = f"{row['ratio']:5.2f} x floor  {row['tokens_per_second']:9,.0f} tok/s"
    return f"{row['what']:<20} {row['p50_s']:8.4g} s  {speed}  {used}{peak}{predicted}"


if __name__ == "__main__":
    main()
