"""Held-out evaluation beside its bare forward passes: one run, turns in random order, medians.

The bare forward passes make both models' logits over the same rows, in the same precision, and look at none of them.
Run: python benchmarks/heldout.py [--dtype bfloat16] [--tokens 100000] [--repeats 3]. Appends a row to
benchmarks/results/heldout.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import turns
import whole_step

from tailkd.data.batches import Batch
from tailkd.evaluate.heldout import evaluate
from tailkd.models import precision

RESULTS = Path(__file__).parent / "results" / "heldout.jsonl"
GOAL = 1.6


def forwards(bench: whole_step.Bench, batches: list[Batch]) -> None:
    with torch.inference_mode(), precision.compute(bench.dtype, bench.device):
        for batch in batches:
            ids = batch.input_ids.to(bench.device)
            for split in (bench.teacher.split, bench.student):
                split.plain(input_ids=ids, use_cache=False)


def measured(bench: whole_step.Bench, tokens: int, repeats: int) -> turns.Row:
    rows = -(-tokens // bench.shape.context)
    batches = [bench.batch_of(seed, min(bench.rows, rows - at)) for seed, at in enumerate(range(0, rows, bench.rows))]
    evaluation = partial(evaluate, bench.student, bench.teacher, batches, top_k=10)
    found = evaluation()  # and warms up
    assert found.measures["tokens"] == rows * bench.shape.context
    whole_step.assert_same("evaluation", found.measures["cross_entropy"], expected(bench, batches), bench.dtype)
    times = turns.taken({"forwards": partial(forwards, bench, batches), "evaluation": evaluation}, repeats)
    medians = {f"{name}_s": turns.fifths([wall for wall, _ in values])["p50_s"] for name, values in times.items()}
    return {"tokens": found.measures["tokens"], **medians, **turns.ratios(times, "evaluation", "forwards")}


def expected(bench: whole_step.Bench, batches: list[Batch]) -> float:
    """The student's cross-entropy by transformers and torch alone."""
    total = 0.0
    with torch.inference_mode(), precision.compute(bench.dtype, bench.device):
        for batch in batches:
            logits = bench.student.plain(input_ids=batch.input_ids.to(bench.device), use_cache=False).logits.float()
            labels = batch.labels.flatten().to(bench.device)
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
    return total / sum(batch.count for batch in batches)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    whole_step.add_options(parser)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    about = turns.circumstances() | {name: getattr(arguments, name) for name in ("shape", "dtype", "repeats")}
    row = measured(whole_step.Bench(arguments), arguments.tokens, arguments.repeats) | about
    turns.append(arguments.out, row)
    print(
        f"{row['tokens']:,} tokens, {row['dtype']}: evaluation {row['evaluation_s']:.2f} s, bare forward passes "
        f"{row['forwards_s']:.2f} s, {row['ratio']:.2f} x ({row['processor_ratio']:.2f} of processors; goal {GOAL})"
    )


if __name__ == "__main__":
    main()
