"""The objective beside its lower bound and its rivals: one run, interleaved, medians, behind a correctness gate.

Bare products (teacher logits, student logits, dh, dW) are 1.0. Runs on one thread of a CPU, or on the GPU there is:
python benchmarks/objective.py [--shape cpu|qwen|gemma] [--dtype float32] [--repeats 5] [--only NAME].
Appends rows to benchmarks/results/objective.jsonl; --table writes them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import memory_peak
import rivals
import torch
from rivals import BOUND, EAGER, NAMES, OURS, RIVALS, SHAPES, Case, Competitor

from tailkd.objective import Objective

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "objective.jsonl"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- rows: begin, written by benchmarks/objective.py --table -->", "<!-- rows: end -->")
PACKAGES = ("torch", "trl", "liger_kernel", "cut_cross_entropy")
DENSE_COPIES = 18  # float32 blocks of (tokens x vocabulary) that eager TAD has at its peak (15), with room to spare
GATE = {"float32": 1e-4, "bfloat16": 2e-2}

Row = dict[str, Any]


# ----- memory


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 1 << 33)


def fitted(one: Competitor, case: Case) -> tuple[Case, int]:
    """The case, or its first row where dense logits do not fit, and by how much that is to be scaled."""
    need = DENSE_COPIES * 4 * case.labels.numel() * case.weight.shape[0]
    if not one.dense or case.labels.shape[0] == 1 or need < free_bytes(case.hidden.device):
        return case, 1
    return case.cut(1), case.labels.shape[0]


def peak_growth(one: Competitor, case: Case) -> int:
    """Bytes above the inputs at the peak of a step, gradients included; the step has run once before."""
    case, scale = fitted(one, case)
    one.step(case)
    case.clear()
    if case.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.step(case)
        grown = torch.cuda.max_memory_allocated() - before
    else:
        grown = memory_peak.growth(lambda: one.step(case))
    case.clear()
    fixed = case.weight.numel() * case.weight.element_size()  # the matrix's gradient does not grow with the rows
    return grown if scale == 1 else fixed + scale * max(grown - fixed, 0)


def peak_in_process(name: str, shape: str, dtype: str) -> int | None:
    """`peak_growth` on a CPU, in a fresh process."""
    words = ["--memory-of", name, "--shape", shape, "--dtype", dtype, "--force"]
    return memory_peak.in_process(__file__, words)


# ----- errors and times


def errors(one: Competitor, case: Case) -> tuple[float, float]:
    """Relative errors of both gradients on 1 x 64 positions against float64 and dense logits, for its own loss."""
    assert one.loss is not None
    exact = case.cut(1, 64, torch.float64).gradients(rivals.ours(one.loss, "reference", cached=one.cached))
    found = case.cut(1, 64).gradients(one.step)
    hidden, weight = (float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))
    return hidden, weight


def gate(case: Case, found: dict[str, tuple[float, float]]) -> None:
    """Refuse to time a loss that is wrong: ours against float64, and TAD against the oracle on all that fits."""
    limit = GATE[str(case.hidden.dtype).removeprefix("torch.")]
    case, _ = fitted(EAGER[0], case)
    ours = case.gradients(rivals.ours(Objective()))
    theirs = case.gradients(rivals.ours(Objective(), "reference"))
    case.clear()
    whole = {
        "all positions": tuple(
            float((o.double() - t.double()).norm() / t.double().norm()) for o, t in zip(ours, theirs, strict=True)
        )
    }
    for name, values in (whole | {one.name: found[one.name] for one in OURS if one.name in found}).items():
        assert max(values) < limit, f"{name} is wrong by {max(values):.3g}"


def forget_compiled() -> None:
    """So that a rival compiled for a small cut is compiled anew, not with shapes left open."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def tried(steps: list[Competitor], attempt: Any, missing: dict[str, str]) -> dict[str, Any]:
    """What `attempt` says of each; a rival that fails goes to `missing` with its reason."""
    results = {}
    for one in steps:
        try:
            results[one.name] = attempt(one)
        except Exception as reason:
            if one.name not in RIVALS:
                raise
            missing[one.name] = rivals.told(reason)
    return results


def seconds(one: Competitor, case: Case) -> float:
    case.clear()
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    one.step(case)
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    case.clear()
    return took


def timed(found: list[Competitor], cases: dict[str, tuple[Case, int]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, the competitors taking turns, each time in another order: a hot card is slower."""
    times: dict[str, list[float]] = {one.name: [] for one in found}
    order = random.Random(0)
    for _ in range(repeats):
        for one in order.sample(found, len(found)):
            case, scale = cases[one.name]
            times[one.name].append(scale * seconds(one, case))
    return times


def measured(names: list[str], shape: str, dtype: str, repeats: int, device: torch.device) -> list[Row]:
    """A row per name: figures (memory on a GPU alone), or why there are none."""
    found, missing = rivals.chosen(names, device)
    case = Case.drawn(SHAPES[shape], getattr(torch, dtype), device)
    wrong = tried([one for one in found if one.loss], lambda one: errors(one, case), missing)
    gate(case, wrong)
    forget_compiled()
    cases = {one.name: fitted(one, case) for one in found if one.name not in missing}
    tried([one for one in found if one.name in cases], lambda one: seconds(one, cases[one.name][0]), missing)  # warm-up
    found = [one for one in found if one.name not in missing]
    times = timed(found, cases, repeats)
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows: list[Row] = []
    for one in found:
        fifths = statistics.quantiles(times[one.name] * (2 if repeats == 1 else 1), n=5, method="inclusive")
        own_loss, scale = middle.get(one.beside or ""), cases[one.name][1]
        hidden, weight = wrong.get(one.name, (None, None))
        row: Row = {"what": one.name, "p20_s": fifths[0], "p50_s": middle[one.name], "p80_s": fifths[3]}
        row |= {"ratio": middle[one.name] / middle[BOUND.name], "to_ours": own_loss and middle[one.name] / own_loss}
        row |= {"peak_bytes": peak_growth(one, case) if device.type == "cuda" else None}
        row |= {"error_hidden": hidden, "error_weight": weight, "beside": one.beside, "note": one.note}
        rows.append(row | {"scaled": f"one row, scaled by {scale}" if scale > 1 else None})
    return rows + [{"what": name, "skipped": reason} for name, reason in missing.items()]


# ----- the table


def figure(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def newest(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows of the last run of each shape, dtype and device."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["dtype"], row["device"]), []).append(row)
    order = sorted(groups, key=lambda key: (list(SHAPES).index(key[0]), key[2], key[1]))
    return {key: [row for row in groups[key] if row.get("run") == groups[key][-1].get("run")] for key in order}


def ahead(rows: list[Row]) -> str:
    """Who beats our row of the same loss, and in what."""
    of = {row["what"]: row for row in rows}
    columns = {"p50_s": "in time", "peak_bytes": "in memory", "error_weight": "in the error of the matrix's gradient"}
    pairs, found = [(row, of[row["beside"]]) for row in rows if row.get("beside") in of], []
    if not pairs:
        return ""
    for column, words in columns.items():
        names = [a["what"] for a, b in pairs if a.get(column) and b.get(column) and a[column] < b[column]]
        found += [f"{words}: {', '.join(names)}"] if names else []
    return (
        f"Ahead of our row of the same loss, {'; '.join(found)}."
        if found
        else "No row is ahead of ours of the same loss."
    )


def section(key: tuple[str, str, str], rows: list[Row]) -> list[str]:
    shape, dtype, device = SHAPES[key[0]], *key[1:]
    about = rows[-1]
    versions = [f"{name} {about[name]}" for name in ("python", *PACKAGES) if about.get(name)]
    lines = [
        f"### {shape.rows} x {shape.positions:,} positions, {shape.vocabulary:,} ids, {dtype}, {device}",
        "",
        f"Widths {shape.student:,} (student) and {shape.teacher:,} (teacher); {about.get('processor') or 'processor'}; "
        f"{', '.join(versions)}; commit {about['commit']}; {about['repeats']} repeats.",
        "",
        "| | p20 s | p50 s | p80 s | x bare products | x ours of its loss | peak MB | error dh | error dW |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "skipped" not in row):
        name = row["what"] + (f" ({row['scaled']})" if row.get("scaled") else "")
        cells = [name, *(figure(row[name], "{:.4g}") for name in ("p20_s", "p50_s", "p80_s"))]
        peak = row.get("peak_bytes")
        cells += [figure(row["ratio"]), figure(row.get("to_ours")), figure(peak and peak / 1e6, "{:,.0f}")]
        cells += [figure(row.get(name), "{:.1e}") for name in ("error_hidden", "error_weight")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", ahead(rows), ""]
    left_out = [f"- {row['what']}: `{row['skipped']}`" for row in rows if "skipped" in row]
    return lines + (["Left out:", "", *left_out, ""] if left_out else [])


def write_table(results: Path, page: Path) -> None:
    """Put the newest rows between the two marks of the page."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    text = page.read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in MARKS):
        sys.exit(f"expected the lines {MARKS[0]!r} and {MARKS[1]!r} once each in the page")
    groups = newest(rows)
    lines = [line for key, group in groups.items() for line in section(key, group)]
    notes = {row["what"]: row["note"] for group in groups.values() for row in group if row.get("note")}
    said = [f"- **{name}**: {note}." for name, note in notes.items()]
    lines += ["### What each row computes", "", *said, ""] if said else []
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    page.write_text(before + "\n".join([MARKS[0], "", *lines, MARKS[1]]) + after, encoding="utf-8")


# ----- the command


def circumstances(shape: str, repeats: int, device: torch.device) -> Row:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False) if shutil.which("git") else None
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": shape,
        "device": card or "cpu, 1 thread",
        "card": card,
        "processor": next(names, platform.processor() or platform.machine()),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() if commit else "",
        "repeats": repeats,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def precisions(asked: list[str] | None, device: torch.device) -> list[str]:
    """Those asked for; else both, where bfloat16 products are not emulated."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    if asked or device.type == "cuda" or flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return asked or ["float32", "bfloat16"]
    print("bfloat16 is left out: this processor has no bfloat16 products; --dtype bfloat16 runs it anyway")
    return ["float32"]


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    names = [name for name in NAMES if name == BOUND.name or not arguments.only or name in arguments.only]
    about = circumstances(arguments.shape, arguments.repeats, device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for dtype in precisions(arguments.dtype, device):
        for row in measured(names, arguments.shape, dtype, arguments.repeats, device):
            if device.type == "cpu" and "skipped" not in row:
                row["peak_bytes"] = peak_in_process(row["what"], arguments.shape, dtype)
            whole = {**row, "dtype": dtype, **about}
            rounded = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in whole.items()}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
            print(f"{dtype:>9}  {row['what']:<22} {spoken(row)}", flush=True)


def spoken(row: Row) -> str:
    if "skipped" in row:
        return f"left out: {row['skipped']}"
    peak, errors = row["peak_bytes"], [figure(row[name], "{:.1e}") for name in ("error_hidden", "error_weight")]
    return (
        f"{row['p50_s']:8.4g} s  {row['ratio']:6.2f} x bare products  {figure(row['to_ours']):>5} x ours  "
        f"{figure(peak and peak / 1e6, '{:,.0f}'):>7} MB  dh {errors[0]}  dW {errors[1]}  {row['scaled'] or ''}"
    ).rstrip()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", metavar="cpu|qwen|gemma")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--only", choices=NAMES, action="append", help="measure these (and the bare products)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSONL file that rows are appended to")
    parser.add_argument("--force", action="store_true", help="run a GPU's shape on a CPU")
    parser.add_argument("--table", action="store_true", help="write the rows of --out into --page, measure nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--memory-of", choices=NAMES, metavar="NAME", help="print the peak of one alone, in bytes")
    arguments = parser.parse_args(words)
    if arguments.table:
        return write_table(arguments.out, arguments.page)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and arguments.shape in ("qwen", "gemma") and not arguments.force:
        sys.exit(f"the shape {arguments.shape} wants a GPU, and there is none; --force runs it on the CPU")
    torch.set_num_threads(1)
    if arguments.memory_of:
        found, missing = rivals.chosen([arguments.memory_of], device)
        if missing:
            sys.exit(missing[arguments.memory_of])
        dtype = getattr(torch, (arguments.dtype or ["float32"])[0])
        return print(peak_growth(found[0], Case.drawn(SHAPES[arguments.shape], dtype, device)))
    return run(arguments, device)


if __name__ == "__main__":
    main()
