"""Run folders made by hand: what was measured is what a test wants it to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailkd.report.record import Run

TAIL_MASS = {"1": 0.6, "5": 0.3, "10": 0.2, "20": 0.1}
ROWS = 40
STEP_TOKENS = 100  # 2 rows of 50


def measures(kl: float | None, cross_entropy: float = 3.0) -> dict[str, Any]:
    names = ("head_kl", "tail_kl", "top1_agreement", "mismatch_rate", "acceptance")
    shared = dict.fromkeys(names, None if kl is None else 0.4)
    plain = {"cross_entropy": cross_entropy, "full_ece": 0.02, "ece": 0.01, "top1_accuracy": 0.4}
    return {"tokens": 10 * ROWS, "kl": kl, **shared, **plain, "tail_mass": TAIL_MASS}


def make_run(
    folder: Path,
    name: str,
    *,
    kl: Sequence[float] | None,
    curve: Sequence[float | None] = (2.0,),
    seconds: float = 2.0,
    seed: int = 1,
    objective: dict[str, Any] | None = None,
    bill: float | None = 1e-6,
    **data: Any,
) -> Run:
    """A run folder with this KL in each held-out row (nats per token); None is a run without a teacher.

    curve: KL of the student's evaluations before the last, the first one untrained, each `STEP_TOKENS` and `seconds`
    after the other. bill: PFLOP per million tokens; None is a run of an earlier release.
    """
    folder = folder / name
    folder.mkdir()
    rows = len(kl) if kl is not None else ROWS
    sums = {"tokens": [10.0] * rows, "cross_entropy": [30.0] * rows}
    sums |= {} if kl is None else {"kl": [10 * v for v in kl]}
    mean = None if kl is None else sum(kl) / len(kl)
    values = [*(curve if kl is not None else [None] * len(curve)), mean]
    held = {"measures": measures(mean), "rows": sums, "reliability": [[0.3, 0.2, 400.0], [0.8, 0.7, 90.0]]}
    teacher = None if kl is None else measures(0.0)
    json_files = {
        "evaluation.json": {"teacher": teacher, "student_before": measures(values[0]), "student": measures(mean)},
        "heldout.json": {"teacher": held if teacher else None, "student_before": held, "student": held},
        "data.json": {**DATA, **data},
        "samples.json": {"prompt": "once <b>", "student": "upon", "teacher": "a time"},
        "environment.json": ENVIRONMENT,
    }
    if bill is not None:
        json_files["bill.json"] = {"pflop_per_million_tokens": {"total": bill}}
    for file, content in json_files.items():
        (folder / file).write_text(json.dumps({"format": 1, **content}))
    _write_metrics(folder, values, seconds)
    recipe = {
        "name": name,
        "out": str(folder),
        "teacher": None if kl is None else {"model": "big"},
        "objective": objective or {"divergence": "forward_kl"},
        "data": {"context": STEP_TOKENS // 2},
        "training": {"seed": seed, "batch_size": 2},
        "evaluate": {"top_k": 10},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return Run(folder)


DATA = {
    "train": {"documents": 9, "tokens": 900},
    "heldout": {"documents": 2, "tokens": 400},
    "skipped": {},
    "skipped_named": [],
}
ENVIRONMENT = {"versions": {"tailkd": "0", "torch": "0", "transformers": "0"}, "device": "cpu", "threads": 2}


def _write_metrics(folder: Path, values: Sequence[float | None], seconds: float) -> None:
    records: list[dict[str, Any]] = [{"kind": "header", "format": 1}]
    for step, value in enumerate(values):
        tokens = step * STEP_TOKENS
        if step:
            timed = {"tokens_per_second": STEP_TOKENS / seconds, "seconds": step * seconds, "floored_rows": 2}
            records.append({"kind": "step", "step": step, "tokens": tokens, **timed})
        role = {"role": "student", "step": step, "tokens_trained": tokens}
        records.append({"kind": "evaluation", **role, **measures(value, 3.0 + (value or 0.0))})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tasks(run: Run, **scores: Sequence[float]) -> Run:
    """tasks.json with these scores of each task's items; the same number of items is the same items."""
    results = [
        {
            "task": task,
            "suite": "commonsense" if task in ("piqa", "hellaswag") else "mathematics",
            "shots": 0,
            "metric": "acc_norm",
            "value": float(np.mean(of)),
            "error": float(np.std(of, ddof=1) / np.sqrt(len(of))),
            "items": len(of),
            "limit": None,
            "data": None,
            "items_hash": f"{len(of):016x}",
            "scores": list(of),
            "samples": f"tasks/{task}-0.jsonl",
            "model": "student",
            "command": "tailkd evaluate",
        }
        for task, of in scores.items()
    ]
    (run.folder / "tasks.json").write_text(json.dumps({"format": 1, "results": results}))
    return Run(run.folder)


def noisy(mean: float, seed: int, spread: float = 0.05, rows: int = ROWS) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).standard_normal(rows)).tolist()
