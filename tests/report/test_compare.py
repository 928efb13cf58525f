"""`tailkd compare`: at the end, at equal tokens, FLOPs and seconds, with seeds, on tasks, and in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import ROWS, STEP_TOKENS, make_run, noisy, write_tasks
from typer.testing import CliRunner

from tailkd import cli
from tailkd.errors import Refusal
from tailkd.report import curves
from tailkd.report.groups import grouped, matched
from tailkd.report.record import Run
from tailkd.report.verdicts import Comparison, Section, compared, sentences

TAD, KL = {"divergence": "tail_aware"}, {"divergence": "forward_kl"}


def tailkd(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def section(found: Comparison, at: str) -> Section:
    return next(one for one in found.sections if one.at == at)


def values(of: Section, measure: str) -> dict[str, list[float]]:
    return {row.method: row.values for row in of.rows if row.measure.title == measure}


@pytest.fixture
def pair(tmp_path: Path) -> list[Run]:
    """tad is better at the end and took 4 steps, of which each costs twice as much and as long; kl took 8."""
    kl = make_run(tmp_path, "kl", kl=noisy(0.4, 0), curve=(3.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45))
    settings: dict[str, Any] = {"seconds": 4.0, "bill": 2e-6, "objective": TAD}
    return [kl, make_run(tmp_path, "tad", kl=noisy(0.2, 1), curve=(3.0, 0.8, 0.6, 0.4), **settings)]


def test_equal_tokens_flops_and_seconds(pair: list[Run]) -> None:
    """tad ends at 400 tokens, 800 kFLOP and 16 s; kl there, and at its own end."""
    found = compared(pair)
    assert [(one.at, one.x) for one in found.sections] == [("end", None), ("tokens", 4 * STEP_TOKENS)]
    assert values(section(found, "tokens"), "KL(T||S)")["kl"] == [0.7]
    end = pair[1].evaluation["student"]["kl"]
    assert values(section(found, "tokens"), "KL(T||S)")["tad"] == [end]
    assert "All runs end at 16.0 s: at equal time is at the end." in found.notes
    assert "All runs end at 800 kFLOP: at equal FLOPs is at the end." in found.notes
    assert section(found, "end").notes == ["The runs end at 400 tokens to 800 tokens: not at the same budget."]
    assert curves.flops(pair[0]) == pytest.approx(8 * STEP_TOKENS * 1e-6 * 1e9)


def test_between_evaluations_on_the_straight_line(pair: list[Run], tmp_path: Path) -> None:
    halfway = make_run(tmp_path, "half", kl=noisy(0.3, 2), curve=(3.0, 0.8), seconds=3.5, objective=TAD)
    place = section(compared([pair[0], halfway], at="seconds"), "seconds")
    assert place.x == 7.0
    assert values(place, "KL(T||S)")["kl"] == [pytest.approx(0.8 + 0.5 * (0.7 - 0.8))]
    assert place.notes == ["On the straight line between two evaluations: kl."]
    assert all(row.difference is None or not row.difference.known for row in place.rows)
    (told,) = sentences(compared([pair[0], halfway], at="seconds"))
    assert told.startswith("No interval is known at equal time (7.0 s): rows and items are stored of the end")


def test_nothing_is_made_up_before_the_first_evaluation(pair: list[Run], tmp_path: Path) -> None:
    """A straight line from the untrained student says nothing of where it was."""
    early = make_run(tmp_path, "early", kl=noisy(0.9, 2), curve=(3.0,), seconds=1.0, objective=TAD)
    place = section(compared([pair[0], early], at="seconds"), "seconds")
    assert list(values(place, "KL(T||S)")) == ["early"]
    assert place.notes == ["Not known of kl: first measured later (evaluate.every_tokens sets how often)."]
    assert curves.at(pair[0], "tokens", 1e9) is None


def test_where_all_runs_end_the_rows_give_an_interval(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "kl", kl=noisy(0.4, 0)), make_run(tmp_path, "tad", kl=noisy(0.2, 1), objective=TAD)]
    place = section(compared(runs, at="tokens"), "tokens")
    (row,) = (row for row in place.rows if row.difference and row.measure.title == "KL(T||S)")
    assert row.difference is not None
    assert row.difference.sample is not None
    assert row.difference.sample.number == ROWS
    assert row.verdict == "better"


def test_a_run_without_a_bill(pair: list[Run], tmp_path: Path) -> None:
    old = make_run(tmp_path, "old", kl=noisy(0.3, 2), bill=None, objective=TAD)
    assert "At equal FLOPs: not known without a bill.json of old." in compared([pair[0], old]).notes
    with pytest.raises(Refusal, match=r"without a bill.json of old\. Take another --at"):
        compared([pair[0], old], at="flops")


def test_a_run_that_stopped_before_its_first_evaluation(pair: list[Run], tmp_path: Path) -> None:
    stopped = make_run(tmp_path, "stopped", kl=noisy(3.0, 2), curve=(), objective=TAD)
    notes = compared([pair[0], stopped]).notes
    assert "At equal tokens: not known, since stopped was measured before training alone." in notes


def test_one_method_is_no_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"kl-seed={seed}", kl=noisy(0.4, seed), seed=seed) for seed in (1, 2)]
    with pytest.raises(Refusal, match=r"takes two methods or more; got kl-seed=1, kl-seed=2, whose recipes do not"):
        compared(runs)


# ----- seeds


def test_runs_that_differ_in_the_seed_alone_are_one_method(tmp_path: Path) -> None:
    made = [("kl-seed=1", 1, KL), ("tad-a", 1, TAD), ("kl-seed=2", 2, KL), ("tad-b", 2, TAD), ("again", 2, KL)]
    runs = [make_run(tmp_path, name, kl=noisy(0.4, seed), seed=seed, objective=o) for name, seed, o in made]
    groups = grouped(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("kl", 2), ("tad", 2), ("again", 1)]
    assert groups[0].label == "kl (2 seeds)"
    assert [group.name for group in grouped([runs[0], runs[0]])] == ["kl-seed=1", "kl-seed=1 #2"]
    one, other, paired = matched(groups[0], groups[1])
    assert paired
    assert [run.name for run in (*one.runs, *other.runs)] == ["kl-seed=1", "kl-seed=2", "tad-a", "tad-b"]
    assert not matched(groups[0], groups[2])[2]


def test_seeds_are_compared_in_pairs(tmp_path: Path) -> None:
    """Each seed moves both methods: in pairs the distance is always 0.01, and 4 has no partner."""
    shift = {1: 0.0, 2: 0.1, 3: 0.2, 4: 5.0}
    kl = [make_run(tmp_path, f"kl-{s}", kl=noisy(0.5 + shift[s], 0), seed=s) for s in (3, 1, 2)]
    runs = [make_run(tmp_path, f"tad-{s}", kl=noisy(0.49 + d, 0), seed=s, objective=TAD) for s, d in shift.items()]
    found = compared([*kl, *runs], at="end")
    row = next(row for row in section(found, "end").rows if row.difference and row.measure.title == "KL(T||S)")
    assert row.difference is not None
    assert row.difference.value == pytest.approx(-0.01)
    assert row.difference.seeds is not None
    assert row.difference.seeds.number == 3
    assert row.difference.seeds.high == pytest.approx(-0.01)
    assert len(row.values) == 4
    assert row.verdict == "better"
    assert any(sentence.startswith("The noise is that of 3 seeds and of the sample") for sentence in sentences(found))


# ----- tasks


def test_tasks_are_compared_on_the_same_items(pair: list[Run]) -> None:
    write_tasks(pair[0], piqa=[1.0] * 30 + [0.0] * 70, gsm8k=[1.0, 0.0] * 20, svamp=[0.0] * 30)
    write_tasks(pair[1], piqa=[1.0] * 60 + [0.0] * 40, gsm8k=[0.0, 1.0] * 20, svamp=[0.0] * 31)
    found = compared([Run(run.folder) for run in pair], at="end")
    tasks = [row for row in section(found, "end").rows if row.measure.title.endswith("shots)") and row.difference]
    assert [(row.measure.title, row.gap, row.verdict) for row in tasks] == [
        ("piqa (0 shots)", "+30.00", "better"),
        ("gsm8k (0 shots)", "+0.00", "tie"),
    ]
    assert tasks[0].difference is not None
    assert tasks[0].difference.sample is not None
    assert tasks[0].difference.sample.units == "items"


# ----- the verb


def test_what_it_says(pair: list[Run]) -> None:
    told = tailkd(*(run.folder for run in pair))
    assert "At the end, less kl" in told
    assert "At equal tokens (400 tokens), less kl" in told
    assert "At the end, tad against kl: better in KL(T||S); within the noise in CE; no interval for Full-ECE." in told
    assert "The noise is that of the sample (40 held-out rows); what another seed gives is not in it" in told
    assert "2 differences were tested, each at 95 %: if nothing were different, 0.1 of them" in told
    assert "warning: The divergence has another total weight" in told


def test_the_baseline_may_be_any_run(pair: list[Run], tmp_path: Path, undrawn: None) -> None:
    page = tmp_path / "page.html"
    told = tailkd(pair[1].folder, "--baseline", pair[0].folder, "--at", "end", "--out", page)
    assert "At the end, less kl" in told
    assert f"report: {page}" in told
    assert "Less kl, at the end" in page.read_text("utf-8")


def test_json(pair: list[Run]) -> None:
    found = json.loads(tailkd(*(run.folder for run in pair), "--at", "tokens", "--json"))
    assert found["baseline"] == "kl"
    assert [method["name"] for method in found["methods"]] == ["kl", "tad"]
    (place,) = found["sections"]
    assert (place["at"], place["x"]) == ("tokens", 400)
    row = next(row for row in place["rows"] if row["method"] == "tad" and row["measure"] == "KL(T||S)")
    assert row["difference"]["value"] == pytest.approx(row["mean"] - 0.7)
    assert row["verdict"] == "not known"
    assert found["words"]
    assert found["warnings"]
