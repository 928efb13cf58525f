"""Averages over suites, changes against a baseline, and what is merged with what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tailkd.errors import Refusal
from tailkd.report.record import FORMAT, Run
from tailkd.report.tasks import averages, change, counterpart, merged, print_tasks, results_of

SUITES = {"commonsense": ("piqa", "arc_easy", "storycloze_2018")}


def result(task: str, value: float, error: float = 0.02, **others: Any) -> dict[str, Any]:
    entry = {"task": task, "suite": "commonsense", "shots": 0, "metric": "acc", "value": value, "error": error}
    return {**entry, "items": 400, "limit": 400, "items_hash": "a" * 16, "scores": [], **others}


def test_an_average_names_what_it_is_over() -> None:
    (found,) = averages([result("piqa", 0.6, 0.03), result("arc_easy", 0.4, 0.04)], SUITES)
    assert found.value == pytest.approx(0.5)
    assert found.error == pytest.approx(0.025)  # of two independent ones: 5 / 2
    assert found.tasks == ("piqa", "arc_easy")
    assert found.left_out == ("storycloze_2018",)
    assert found.change is None
    assert not averages([result("piqa", 0.6)], SUITES)  # of one task there is none


def test_shots_and_limits_are_averaged_apart() -> None:
    many = [result(task, 0.5, shots=shots, limit=limit) for task in SUITES["commonsense"] for shots, limit in PLACES]
    assert [(one.shots, one.limit) for one in averages(many, SUITES)] == PLACES


PLACES: list[tuple[int, int | None]] = [(0, 400), (5, 400), (5, None)]


@pytest.mark.parametrize("base", [10, math.e])
def test_the_change_is_a_mean_of_logarithms_over_what_both_have(base: float) -> None:
    ours = [result("piqa", 0.6), result("arc_easy", 0.4), result("storycloze_2018", 0.9, items_hash="b" * 16)]
    theirs = [result("piqa", 0.5), result("arc_easy", 0.5), result("storycloze_2018", 0.1)]
    (found,) = averages(ours, SUITES, theirs, base=base)
    expected = (100 * math.log(0.6 / 0.5) + 100 * math.log(0.4 / 0.5)) / 2 / math.log(base)
    assert found.change == pytest.approx(expected)
    assert found.compared == ("piqa", "arc_easy")


def test_what_has_no_logarithm_has_no_change() -> None:
    assert change([(result("piqa", 0.0), result("piqa", 0.5))], 10) is None
    assert change([], 10) is None


def test_only_the_same_items_are_compared() -> None:
    one = result("piqa", 0.5)
    assert counterpart(one, [result("piqa", 0.4)]) is not None
    for other in ({"shots": 5}, {"items_hash": "b" * 16}, {"task": "arc_easy"}):
        assert counterpart(one, [result("piqa", 0.4) | other]) is None


def test_measured_again_replaces() -> None:
    before = [result("piqa", 0.1), result("piqa", 0.2, shots=5), result("piqa", 0.3, limit=None)]
    found = merged(before, [result("piqa", 0.9)])
    assert [one["value"] for one in found] == [0.9, 0.2, 0.3]


def test_results_are_read_from_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"has no results of tasks \(tasks.json\)"):
        results_of(tmp_path)
    assert Run(tmp_path).tasks == []
    content = {"format": FORMAT, "results": [result("piqa", 0.5)]}
    for name in ("tasks.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(content))
    places = (tmp_path, tmp_path / "tasks.json", tmp_path / "other.json")
    assert [results_of(place) for place in places] == [content["results"]] * 3
    assert Run(tmp_path).tasks == content["results"]
    (tmp_path / "tasks.json").write_text(json.dumps({**content, "format": FORMAT + 1}))
    for place in places[:2]:
        with pytest.raises(Refusal, match="this tailkd reads format"):
            results_of(place)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ours = [result("piqa", 0.6), result("arc_easy", 0.4), result("storycloze_2018", 0.5, items_hash="b" * 16)]
    theirs = [result("piqa", 0.5), result("arc_easy", 0.5), result("storycloze_2018", 0.5)]
    print_tasks(ours, averages(ours, SUITES, theirs), theirs)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "task shots metric value % items baseline % change (base 10)",
        "piqa 0 acc 60.00 ± 2.00 400 50.00 +7.92",
        "arc_easy 0 acc 40.00 ± 2.00 400 50.00 -9.69",
        "storycloze_2018 0 acc 50.00 ± 2.00 400 – –",
        "average, commonsense 0 50.00 ± 1.15 -0.89",
        "average, commonsense, 0 shots: over 3 tasks, the first 400 items of each; change over 2 of them, which the "
        "baseline has with the same items and shots",
    ]
    print_tasks(ours[:2], averages(ours[:2], SUITES))
    told = capsys.readouterr().out
    assert "over 2 tasks, without storycloze_2018" in told
    assert "baseline" not in told
