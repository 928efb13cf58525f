"""A whole training step beside its floor and beside other trainers: one run, turns in random order, medians.

The floor is the teacher's backbone forward, the student's backbone forward and backward, the four bare products of the
loss and a bare AdamW, nothing else. Run: python benchmarks/step.py [--shape cpu|qwen|gemma] [--dtype bfloat16]
[--rivals] [--compile] [--rows 8] [--repeats 5] [--profile FILE]. Appends rows to benchmarks/results/step.jsonl;
--table writes them into docs/performance.md. On a CPU that other work uses too, start it with
OMP_WAIT_POLICY=passive: processor time is then work and no waiting.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_peak
import torch
import trainers
import turns
from turns import CLOCK, PROCESSORS, Row
from whole_step import OURS, Bench, add_options, assert_same, check_losses

from tailkd.models import precision
from tailkd.objective import Objective

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step.jsonl"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- steps: begin, written by benchmarks/step.py --table -->", "<!-- steps: end -->")
FLOOR = "floor"
MATRIX = 8192  # of the product that tells what a GPU can do


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float | None:
    """Operations per second of one large product of random numbers, median of ten; None for a CPU, which others use."""
    if device.type == "cpu":
        return None
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    work: Callable[[], Any] = lambda: left @ right  # noqa: E731
    work()
    return 2 * MATRIX**3 / statistics.median(turns.seconds(work)[CLOCK] for _ in range(10))


class Competitors:
    """Steps by name, each over a student of its own that starts from the same weights; ours share one."""

    def __init__(self, bench: Bench, names: list[str]) -> None:
        self.bench, self.missing = bench, {}
        self.steps: dict[str, Callable[[], None]] = {}
        self.trainers: list[trainers.StepByStep] = []
        for name in names:
            if name == FLOOR:
                self.steps[name] = bench.floor
            elif name in OURS:
                self.steps[name] = bench.ours(OURS[name])
            else:
                try:
                    self.steps[name] = self._rival(name)
                except Exception as reason:
                    self.missing[name] = told(reason)

    def _rival(self, name: str) -> Callable[[], None]:
        """A trainer whose loss is ours of the same divergence."""
        bench = self.bench
        models = copy.deepcopy(bench.student.plain), bench.teacher.split.plain
        trainer, rows = trainers.RIVALS[name](*models, bench.batch, bench.dtype)
        with torch.no_grad(), precision.compute(bench.dtype, bench.device):
            theirs = float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainers.stacked(rows))))
        ours = bench.loss(OURS["tailkd forward_kl"], bench.batch)["divergence" if name == trainers.GKD else "loss"]
        assert_same(name, theirs, ours, bench.dtype)
        self.trainers.append(trainers.StepByStep(trainer))
        return self.trainers[-1].step

    def close(self) -> None:
        for one in self.trainers:
            one.close()


def told(reason: Exception) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:200]


def measured(bench: Bench, names: list[str], repeats: int) -> list[Row]:
    """A row per competitor, after one turn to warm up."""
    check_losses(bench)
    competitors = Competitors(bench, names)
    peaks = {name: peak_bytes(one) for name, one in competitors.steps.items()}
    times = turns.taken(competitors.steps, repeats)
    competitors.close()
    peak, operations = matrix_peak(bench.dtype, bench.device), bench.operations()
    rows: list[Row] = []
    for name, found in times.items():
        row: Row = {"what": name, **turns.fifths([one[CLOCK] for one in found]), **turns.ratios(times, name, FLOOR)}
        row |= {"processor_s": statistics.median(one[PROCESSORS] for one in found), "peak_bytes": peaks[name]}
        row |= {"tokens_per_second": bench.batch.count / row["p50_s"]}
        with_teacher = OURS.get(name, Objective()).needs_teacher
        row |= {"utilisation": operations / row["p50_s"] / peak if peak and with_teacher else None, "matrix_peak": peak}
        rows.append(row | {"predicted_bytes": bench.predicted_bytes() if name in OURS and with_teacher else None})
    return rows + [{"what": name, "skipped": reason} for name, reason in competitors.missing.items()]


def peak_bytes(work: Callable[[], None]) -> int | None:
    """The most that torch holds on the GPU during a step, models and optimizer included; the step has run before."""
    work()
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def grown_bytes(name: str, arguments: argparse.Namespace) -> int | None:
    """On a CPU: bytes above weights and optimizer at the peak of a step, in a process of its own."""
    options = ["--shape", arguments.shape, "--dtype", arguments.dtype, "--rows", str(arguments.rows)]
    return memory_peak.in_process(__file__, ["--memory-of", name, *options])


def print_growth(bench: Bench, name: str) -> None:
    competitors = Competitors(bench, [name])
    work = competitors.steps[name]
    work()
    print(memory_peak.growth(work))
    competitors.close()


def profiled(work: Callable[[], None], path: Path) -> None:
    """The 15 kernels (operators, on a CPU) that a step spends most time in, as a table."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        turns.seconds(work)
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
    load = f"; load {about['load']:.1f} when it began" if "load" in about else ""
    peak = about["matrix_peak"]
    reached = f"; a large product reaches {peak / 1e12:,.2f} TFLOP/s" if peak else ""
    lines = [
        f"### {about['shape']}: {size}{way}, {about['device']}",
        "",
        f"{versions}; {about['repeats']} repeats{load}{reached}.",
        "",
        "| | p20 s | p50 s | p80 s | x floor | x floor, processor | tokens/s | of the peak | peak GB | bill GB "
        "| above weights MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "skipped" not in row):
        cells = [row["what"], *(f"{row[name]:.4g}" for name in ("p20_s", "p50_s", "p80_s"))]
        cells += ["–" if row.get(name) is None else f"{row[name]:.2f}" for name in ("ratio", "processor_ratio")]
        cells += [f"{row['tokens_per_second']:,.0f}"]
        cells += ["–" if row["utilisation"] is None else f"{row['utilisation']:.1%}"]
        cells += ["–" if row[name] is None else f"{row[name] / 1e9:.2f}" for name in ("peak_bytes", "predicted_bytes")]
        cells.append("–" if row.get("grown_bytes") is None else f"{row['grown_bytes'] / 1e6:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    left_out = [f"- {row['what']}: `{row['skipped']}`" for row in rows if "skipped" in row]
    return [*lines, "", *(["Left out:", "", *left_out, ""] if left_out else [])]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rivals", action="store_true", help="a plain Trainer and TRL's GKD too")
    parser.add_argument("--profile", type=Path, help="write the 15 longest kernels of a step of TAD here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the rows into the page, measure nothing")
    parser.add_argument("--memory-of", metavar="NAME", help="print by how many bytes one grows in a step on a CPU")
    arguments = parser.parse_args(words)
    if arguments.table:
        return write_table()
    if not torch.cuda.is_available() and arguments.shape in ("qwen", "gemma"):
        sys.exit(f"the shape {arguments.shape} wants a GPU, and there is none")
    about = turns.circumstances()
    bench = Bench(arguments)
    arguments.rows = bench.rows
    if arguments.memory_of:
        return print_growth(bench, arguments.memory_of)
    asked = ("shape", "dtype", "rows", "compile", "checkpointing", "repeats")
    about |= {name: getattr(arguments, name) for name in asked} | {"context": bench.shape.context}
    for row in measured(bench, [FLOOR, *OURS, *(trainers.RIVALS if arguments.rivals else ())], arguments.repeats):
        if bench.device.type == "cpu" and "skipped" not in row:
            row["grown_bytes"] = grown_bytes(row["what"], arguments)
        turns.append(arguments.out, row | about)
        print(spoken(row), flush=True)
    if arguments.profile:
        profiled(bench.ours(Objective()), arguments.profile)
    return None


def spoken(row: Row) -> str:
    if "skipped" in row:
        return f"{row['what']:<20} left out: {row['skipped']}"
    peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.2f} GB"
    grown = f"  {row['grown_bytes'] / 1e6:,.0f} MB above weights" if row.get("grown_bytes") else ""
    predicted = "" if not peak or row["predicted_bytes"] is None else f" (bill {row['predicted_bytes'] / 1e9:6.2f})"
    used = (
        "" if row["utilisation"] is None else f"{row['utilisation']:6.1%} of {row['matrix_peak'] / 1e12:,.2f} TFLOP/s"
    )
    speed = f"{row['ratio']:5.2f} x floor ({row['processor_ratio']:.2f} of processors) "
    speed += f"{row['tokens_per_second']:9,.0f} tok/s"
    return f"{row['what']:<20} {row['p50_s']:8.4g} s  {speed}  {used}{peak}{predicted}{grown}"


if __name__ == "__main__":
    main()
