"""Comparisons: intervals, marks, answers, warnings; made from run folders that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailkd.report import compare
from tailkd.report.figures import charts
from tailkd.report.findings import findings, warnings
from tailkd.report.page import write_page
from tailkd.report.record import Run
from tailkd.report.uncertainty import interval

TAIL_MASS = {"1": 0.6, "5": 0.3, "10": 0.2, "20": 0.1}
ROWS = 40


def measures(kl: float | None) -> dict[str, Any]:
    names = ("head_kl", "tail_kl", "top1_agreement", "mismatch_rate", "acceptance")
    shared = dict.fromkeys(names, None if kl is None else 0.4)
    plain = {"cross_entropy": 3.0, "full_ece": 0.02, "ece": 0.01, "top1_accuracy": 0.4, "tail_mass": TAIL_MASS}
    return {"tokens": 10 * ROWS, "kl": kl, **shared, **plain}


def make_run(folder: Path, name: str, *, kl: list[float], divergence: str = "forward_kl", **data: Any) -> Run:
    """A run folder with this KL in each held-out row (nats per token)."""
    folder = folder / name
    folder.mkdir()
    sums = {"tokens": [10.0] * len(kl), "kl": [10 * v for v in kl], "cross_entropy": [30.0] * len(kl)}
    mean = sum(kl) / len(kl)
    held = {"measures": measures(mean), "rows": sums, "reliability": [[0.3, 0.2, 400.0]]}
    step = {"kind": "step", "step": 1, "tokens": 400, "tokens_per_second": 50.0, "seconds": 8.0, "floored_rows": 2}
    evaluations = [
        {"kind": "evaluation", "role": "student", "step": s, "tokens_trained": t, **measures(v)}
        for s, t, v in ((0, 0, 2.0), (1, 400, mean))
    ]
    files = {
        "evaluation.json": {"teacher": measures(0.0), "student_before": measures(2.0), "student": measures(mean)},
        "heldout.json": {"teacher": held, "student_before": held, "student": held},
        "data.json": {
            "train": {"documents": 9, "tokens": 900},
            "heldout": {"documents": 2, "tokens": 400},
            "skipped": {},
            "skipped_named": [],
            **data,
        },
        "samples.json": {"prompt": "once <b>", "student": "upon", "teacher": "a time"},
        "environment.json": {
            "versions": {"tailkd": "0", "torch": "0", "transformers": "0"},
            "device": "cpu",
            "threads": 2,
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps({"format": 1, **content}))
    lines = [{"kind": "header", "format": 1}, *evaluations, step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(
        f"name: {name}\nout: x\nobjective: {{divergence: {divergence}}}\ntraining: {{seed: 1}}\n"
        "evaluate: {top_k: 10}\n"
    )
    return Run(folder)


def noisy(mean: float, seed: int, spread: float = 0.05) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).standard_normal(ROWS)).tolist()


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    """The second is best; the third within noise of it; the first far behind."""
    runs = {"kl": (0.5, 0), "tad": (0.2, 1), "near": (0.205, 2)}
    divergences = {"kl": "forward_kl", "tad": "tail_aware", "near": "jensen_shannon"}
    return [make_run(tmp_path, n, kl=noisy(*v), divergence=divergences[n]) for n, v in runs.items()]


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        weights = generator.integers(5, 20, 60).astype(float)
        sums = weights * (0.3 + 0.2 * generator.standard_normal(60))
        found = interval(sums.tolist(), weights.tolist())
        hits += found.low <= 0.3 <= found.high
    assert 920 <= hits <= 975


def test_best_and_ties_are_marked(three: list[Run]) -> None:
    lines = {line.name: line for line in compare.lines(three)}
    assert lines["tad"].marks["kl"] == "best"
    assert lines["near"].marks["kl"] == "tie"
    assert "kl" not in lines["kl"].marks
    assert lines["teacher"].marks == {}


def test_the_answers(three: list[Run]) -> None:
    best, real, cost, different = (finding.answer for finding in findings(three))
    kl = [run.evaluation["student"]["kl"] for run in three]
    assert best.startswith(f"tad: held-out KL(T||S) {kl[1]:.4f} nats per token, {kl[2] - kl[1]:.4f} (")
    assert best.endswith("below kl, the last.")
    assert real.startswith("Not from near: ")
    assert "includes 0, a tie. From the others yes." in real
    assert "40 held-out rows" in real
    assert cost == "400 tokens, 8 s to 8 s each of training, 50 to 50 tokens per second (cpu, 2 threads)."
    assert different == "Only objective.divergence (table below); data, order, start and schedule are the same."


def test_a_win_is_called_one(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.5, 0)), make_run(tmp_path, "tad", kl=noisy(0.2, 1))]
    assert findings(runs)[1].answer.startswith("Larger than the noise of the held-out sample: the distance of kl")


def test_other_held_out_rows_do_not_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.5, 0)), make_run(tmp_path, "tad", kl=noisy(0.2, 1)[:-1])]
    assert findings(runs)[1].answer.startswith("It cannot be said")
    assert "the runs were measured on different held-out rows: their numbers do not compare" in warnings(runs)


def test_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tad", kl=noisy(0.2, 1), skipped={"not UTF-8": 3})
    assert warnings([run]) == [
        "3 records of the corpus were skipped (3 x not UTF-8)",
        "tad: 2 rows had a mean tail mass below the floor and weigh less",
    ]


def test_the_page_is_one_file_that_escapes_what_it_shows(three: list[Run], tmp_path: Path) -> None:
    page = write_page(three, tmp_path / "page.html").read_text("utf-8")
    assert "once &lt;b&gt;" in page
    assert "<script" not in page
    assert page.count("<figure>") == 6
    assert page == write_page(three, tmp_path / "again.html").read_text("utf-8")
    alone = write_page(three[:1], tmp_path / "alone.html").read_text("utf-8")
    assert "What did the student reach?" in alone
    assert "What the recipes differ in" not in alone


def test_probabilities_of_every_size_are_drawn_where_all_runs_have_measured_them(three: list[Run]) -> None:
    title, table = "Calibration of all probabilities", [[1e-6, 0.0, 900.0, 0.0], [1e-3, 2e-3, 50.0, 100.0]]
    assert title not in [chart.title for chart in charts(three)]
    for number, run in enumerate(three):
        held = json.loads((run.folder / "heldout.json").read_text())
        measured = json.loads((run.folder / "evaluation.json").read_text())
        for role in ("teacher", "student"):
            held[role]["log_reliability"] = [*table, [0.6, 0.5 + 0.1 * number, 40.0, 40.0]]
            measured[role]["log_ece"] = 0.1 * (number + 1)
        (run.folder / "heldout.json").write_text(json.dumps(held))
        (run.folder / "evaluation.json").write_text(json.dumps(measured))
    (chart,) = (chart for chart in charts([Run(run.folder) for run in three]) if chart.title == title)
    assert "error over these bins kl 10.00 %, tad 20.00 %, near 30.00 %." in chart.words
    assert all(name in chart.svg for name in ("kl", "tad", "near", "teacher", "how often it comes"))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tad", kl=noisy(0.2, 1))
    (run.folder / "evaluation.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"evaluation.json has format 99; this tailkd reads format 1"):
        _ = run.evaluation
    (run.folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"has no evaluation.json yet: run `tailkd distill`"):
        _ = run.evaluation
