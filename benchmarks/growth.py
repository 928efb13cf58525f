"""Does cost grow linearly? Batches out of 1 M to 100 M prepared tokens beside a step, and a run of 2,000 steps.

Stores hold made-up ids. For each size: seconds to open it and split off what is held out, and seconds of a batch in
the order of a run (sizes take turns, medians), beside a whole step of the shape. Then `tailkd.distill` trains a tiny
student: memory and tokens per second of its second and its last tenth of the steps, the median and the 90th
percentile, which other work on the machine disturbs least.
Run: python benchmarks/growth.py [--steps 2000]. Appends rows to benchmarks/results/growth.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import startup
import turns
import whole_step

import tailkd
from tailkd.data.batches import Batches
from tailkd.data.packing import Rows, split
from tailkd.data.tokens import TokenStore
from tailkd.objective import Objective

RESULTS = Path(__file__).parent / "results" / "growth.jsonl"
SIZES = (1_000_000, 10_000_000, 100_000_000)
DOCUMENT, BATCHES = 500, 300  # tokens; batches that are measured of each size


def write_store(folder: Path, tokens: int, vocabulary: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    generator.integers(vocabulary, size=tokens, dtype=np.uint16).tofile(folder / "tokens.bin")
    offsets = np.arange(0, tokens + 1, DOCUMENT, dtype=np.int64)
    offsets.tofile(folder / "offsets.bin")
    generator.integers(2**63, size=len(offsets) - 1, dtype=np.uint64).tofile(folder / "hashes.bin")
    manifest = {"documents": len(offsets) - 1, "dtype": "uint16", "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def opened(folder: Path, bench: whole_step.Bench) -> Batches:
    store = TokenStore(folder, json.loads((folder / "manifest.json").read_text()))
    train, _ = split(store.hashes, 0.01)
    rows = Rows(store, train, context=bench.shape.context, begin=None, end=0)
    return Batches(rows, batch_size=bench.rows, seed=0)


def corpus_rows(bench: whole_step.Bench, folder: Path, sizes: tuple[int, ...], repeats: int) -> list[turns.Row]:
    rows: list[turns.Row] = []
    found: list[Batches] = []
    for size in sizes:
        write_store(folder / str(size), size, bench.vocabulary)
        started = time.perf_counter()
        found.append(opened(folder / str(size), bench))
        rows.append({"what": "corpus", "prepared_tokens": size, "open_s": time.perf_counter() - started})
    times: list[list[float]] = [[] for _ in sizes]
    for number in range(BATCHES):
        for batches, one in zip(found, times, strict=True):
            one.append(turns.seconds(lambda batches=batches, number=number: batches[number])[0])
    work = bench.ours(Objective())
    work()
    whole = statistics.median(turns.seconds(work)[0] for _ in range(repeats))
    for row, one in zip(rows, times, strict=True):
        batch = statistics.median(one)
        row |= {"batch_s": batch, "step_s": whole, "share_of_step": batch / whole}
        row |= {"tokens_per_second": bench.batch.count / (whole + batch)}
    return rows


def steps_row(folder: Path, steps: int) -> turns.Row:
    """The second and the last tenth of a run: the first steps warm up."""
    recipe = startup.write_pair(folder, "tiny")
    sizes = {"training.tokens": steps * 4 * 32, "data.context": 32}
    run = tailkd.distill(recipe, **sizes)
    records = [record for record in run.metrics if record["kind"] == "step"]
    tenth = max(1, steps // 10)
    parts = {"first": records[tenth : 2 * tenth], "last": records[-tenth:]}
    row: turns.Row = {"what": "steps", "steps": len(records)}
    for name, part in parts.items():
        speeds = [record["tokens_per_second"] for record in part]
        row[f"{name}_tokens_per_second"] = statistics.median(speeds)
        row[f"{name}_best_tokens_per_second"] = float(np.quantile(speeds, 0.9))
        row[f"{name}_memory_bytes"] = max(record["memory_bytes"] for record in part)
    return row


def spoken(row: turns.Row) -> str:
    if row["what"] == "steps":
        return (
            f"{row['steps']:,} steps: {row['first_tokens_per_second']:,.0f} tokens per second at first (90th "
            f"percentile {row['first_best_tokens_per_second']:,.0f}), {row['last_tokens_per_second']:,.0f} at last "
            f"({row['last_best_tokens_per_second']:,.0f}); {row['first_memory_bytes'] / 1e6:,.1f} MB at first, "
            f"{row['last_memory_bytes'] / 1e6:,.1f} at last"
        )
    return (
        f"{row['prepared_tokens']:>12,} prepared tokens: open {1e3 * row['open_s']:.1f} ms, batch "
        f"{1e3 * row['batch_s']:.3f} ms, {row['share_of_step']:.3%} of a step of {row['step_s']:.2f} s"
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    whole_step.add_options(parser)
    parser.add_argument("--repeats", type=int, default=5, help="of the step")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    bench = whole_step.Bench(arguments)
    about = turns.circumstances() | {name: getattr(arguments, name) for name in ("shape", "dtype", "repeats")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").mkdir()
        rows = corpus_rows(bench, Path(folder), tuple(arguments.sizes), arguments.repeats)
        rows.append(steps_row(Path(folder) / "run", arguments.steps))
    for row in rows:
        turns.append(arguments.out, row | about)
        print(spoken(row))


if __name__ == "__main__":
    main()
