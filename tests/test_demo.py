"""The demo: small here, and what `make demo` has left in runs/demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailkd import demo
from tailkd.report.record import Run

MADE = Path(__file__).parents[1] / "runs" / "demo"


def test_a_small_demo_makes_all_runs_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CORPUS_BYTES", 300_000)
    for name in ("TEACHER_TRAINING", "STUDENT_TRAINING"):
        monkeypatch.setattr(demo, name, {**getattr(demo, name), "tokens": 2_000})
    monkeypatch.setattr(demo, "EVALUATION", {"tokens": 1_000, "every_tokens": 1_000})
    runs, page = demo.run(tmp_path / "demo")
    assert [run.name for run in runs] == list(demo.STUDENTS)
    assert page == tmp_path / "demo" / "report.html"
    assert len({json.dumps(run.evaluation["teacher"]) for run in runs}) == 1
    assert len({json.dumps(run.evaluation["student_before"]) for run in runs}) == 1
    different = {key for run in runs for key in _differences(run, runs[0])}
    assert {key.split(".")[0] for key in different} <= {"name", "out", "objective"}


def _differences(run: Run, other: Run) -> set[str]:
    from tailkd.report.record import flattened

    one, two = flattened(run.recipe), flattened(other.recipe)
    return {key for key in {**one, **two} if one.get(key) != two.get(key)}


@pytest.mark.skipif(not (MADE / "report.html").is_file(), reason="`make demo` has not run here")
def test_the_demo_shows_what_it_promises() -> None:
    runs = {name: Run(MADE / name).evaluation for name in demo.STUDENTS}
    unigram = json.loads((MADE / "demo.json").read_text())["unigram_cross_entropy"]
    half = (unigram + runs["clm"]["teacher"]["cross_entropy"]) / 2
    for name, evaluation in runs.items():
        assert evaluation["student"]["cross_entropy"] < half, name
        if name in ("forward-kl", "forward-kl-x2", "tad"):
            assert evaluation["student"]["kl"] < runs["clm"]["student"]["kl"], name
