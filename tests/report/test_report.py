"""Answers, marks, warnings and the page of run folders that are made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import STEP_TOKENS, make_run, measures, noisy, write_tasks

from tailkd.report import compare
from tailkd.report.figures import charts
from tailkd.report.findings import findings, warnings
from tailkd.report.page import write_page
from tailkd.report.record import Run, Stopped

TAD, KL, JSD = ({"divergence": name} for name in ("tail_aware", "forward_kl", "jensen_shannon"))


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    """The second is best; the third within noise of it; the first far behind."""
    made = {"kl": (0.5, 0, KL), "tad": (0.2, 1, TAD), "near": (0.205, 2, JSD)}
    return [make_run(tmp_path, n, kl=noisy(m, s), objective=o) for n, (m, s, o) in made.items()]


def seeded(folder: Path, name: str, mean: float, objective: dict[str, str], *, spread: float = 0.002) -> list[Run]:
    """Three seeds of one recipe, at -1, 0 and 1 times `spread` from the mean."""
    return [
        make_run(folder, f"{name}-seed={s}", kl=noisy(mean + (s - 2) * spread, 10 + s), seed=s, objective=objective)
        for s in (1, 2, 3)
    ]


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
    assert "paired over 40 held-out rows, not over seeds, which takes two of both" in real
    assert cost.startswith("100 tokens, 100 kFLOP of student and teacher, 2 s to 2 s each of training, 50 to 50 tokens")
    assert different == "Only objective.divergence (table below); data, order, start and schedule are the same."


def test_a_win_is_called_one(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.5, 0)), make_run(tmp_path, "tad", kl=noisy(0.2, 1), objective=TAD)]
    assert findings(runs)[1].answer.startswith("Larger than the noise: the distance of kl to the best, 0.2968 [")


def test_other_held_out_rows_do_not_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.5, 0)), make_run(tmp_path, "tad", kl=noisy(0.2, 1)[:-1], objective=TAD)]
    assert findings(runs)[1].answer.startswith("It cannot be said")
    assert "the runs were measured on different held-out rows: their numbers do not compare" in warnings(runs)


def test_seeds_are_one_row_with_spread(tmp_path: Path) -> None:
    runs = [*seeded(tmp_path, "kl", 0.5, KL), *seeded(tmp_path, "tad", 0.2, TAD)]
    lines = {line.name: line for line in compare.lines(runs) if line.role == "student"}
    assert list(lines) == ["kl (3 seeds)", "tad (3 seeds)"]
    values = [run.evaluation["student"]["kl"] for run in runs[3:]]
    assert lines["tad (3 seeds)"].measures["kl"] == pytest.approx(sum(values) / 3)
    assert lines["tad (3 seeds)"].cell("kl") == f"{sum(values) / 3:.4f}"
    assert lines["tad (3 seeds)"].deviation("kl").startswith("± 0.0")
    best, real, _, different = (finding.answer for finding in findings(runs))
    assert best.startswith("tad (3 seeds): ")
    assert "paired over 40 held-out rows, and over 3 seeds: both must leave 0 out" in real
    assert different.endswith("data, order, start and schedule are the same for each seed.")


def test_a_difference_that_seeds_do_not_repeat_is_a_tie(tmp_path: Path) -> None:
    """The held-out sample alone would call it one; the seeds go either way."""
    runs = [*seeded(tmp_path, "kl", 0.5, KL, spread=-0.1), *seeded(tmp_path, "tad", 0.45, TAD, spread=0.1)]
    (gap,) = compare.gaps(runs)
    assert gap.difference.sample is not None
    assert gap.difference.sample.leaves_zero_out
    assert gap.difference.real is False
    assert findings(runs)[1].answer.startswith("Not from kl: ")


def test_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tad", kl=noisy(0.2, 1), skipped={"not UTF-8": 3})
    assert warnings([run]) == [
        "3 records of the corpus were skipped (3 x not UTF-8)",
        "rows whose mean tail mass was below the floor, which weigh less: tad 2",
    ]


@pytest.mark.parametrize(
    ("other", "numbers"),
    [
        ({"divergence": "tail_aware", "beta": 2.0, "top_k": 9}, "kl 1.2, other 3"),
        ({"divergence": "forward_kl", "divergence_weight": 2.0}, "kl 1.2, other 2.4"),
        ({"divergence": "forward_kl", "clm_weight": 0.5}, "kl 1.2, other 2.4"),
        ({"divergence": "ghost_token_kl"}, "kl 1.2, other 1"),
        ({"divergence": "tail_aware", "beta": 0.2}, None),
        ({"divergence": "none"}, None),
        ({"divergence": "reverse_kl"}, None),
        ({"divergence": "tail_aware", "clm_weight": 0.0}, None),
    ],
)
def test_another_total_weight_is_told(tmp_path: Path, other: dict[str, float], numbers: str | None) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.2, 1)), make_run(tmp_path, "other", kl=noisy(0.2, 1), objective=other)]
    found = [warning for warning in warnings(runs) if "total weight" in warning]
    assert len(found) == (numbers is not None)
    if numbers:
        assert f"(head + mean of the tail): {numbers}. The tail weighs beta in TAD" in found[0]
        assert "mean tail mass, 0.2 at K = 10" in found[0]


def test_the_page_is_one_file_with_curves_against_each_axis(three: list[Run], tmp_path: Path) -> None:
    page = write_page(three, tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page
    assert page.count("<svg") == 3 * 4 + 2
    assert page.count("<figure") == 3 * 4 + 2
    assert page.count('type="radio"') == 3


def test_the_page_of_one_run(three: list[Run], tmp_path: Path) -> None:
    page = write_page(three[:1], tmp_path / "alone.html").read_text("utf-8")
    assert page == write_page(three[:1], tmp_path / "again.html").read_text("utf-8")
    assert "once &lt;b&gt;" in page
    assert "What did the student reach?" in page
    assert page.count("<figure") == 6
    assert "radio" not in page
    assert "What the recipes differ in" not in page
    assert "larger than the noise" not in page


def test_the_page_without_a_teacher_and_of_a_run_that_stopped(tmp_path: Path, undrawn: None) -> None:
    alone = make_run(tmp_path, "clm", kl=None, objective={"divergence": "none"})
    page = write_page([alone], tmp_path / "alone.html").read_text("utf-8")
    assert "it had no teacher" in page
    (alone.folder / "evaluation.json").unlink()
    (alone.folder / "samples.json").unlink()
    other = make_run(tmp_path, "other", kl=None, seed=2, objective={"divergence": "none", "clm_weight": 2.0})
    page = write_page([Stopped(alone.folder, "Diverged at step 3."), other], tmp_path / "both.html").read_text("utf-8")
    assert "Diverged at step 3." in page


def test_the_page_has_tasks_seeds_sources_and_places(tmp_path: Path, undrawn: None) -> None:
    runs = [*seeded(tmp_path, "kl", 0.5, KL), make_run(tmp_path, "slow", kl=noisy(0.4, 3), seconds=9.0, objective=JSD)]
    halves = {"web": {"kl": 0.1, "cross_entropy": 3.0}, "books": {"kl": 0.7, "cross_entropy": 2.0}}
    for run in runs:
        run.evaluation["student"]["sources"] = halves
        write_tasks(run, piqa=[1.0, 0.0] * 50, hellaswag=[1.0] * 99 + [0.0])
    page = write_page(runs, tmp_path / "page.html").read_text("utf-8")
    for text in (
        "piqa (0 shots, 100 items)",
        "average, commonsense (0 shots, 2 tasks)",
        '<th scope="row">kl (3 seeds)',
    ):
        assert text in page, text
    assert '50.0<span class="more">[40.4, 59.6]</span>' in page
    assert '50.0<span class="more">± 0.0</span>' in page
    assert 'colspan="2">books</th>' in page
    assert page.count("0.7000") == 2
    assert "At equal time (2.0 s)" in page


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


def test_the_made_runs_are_what_they_say(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tad", kl=[0.5] * 4, curve=(2.0, 1.0))
    assert run.evaluation["student"] == measures(0.5)
    assert [r["tokens_trained"] for r in run.evaluations()] == [0, STEP_TOKENS, 2 * STEP_TOKENS]
