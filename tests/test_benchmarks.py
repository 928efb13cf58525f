"""The benchmark of the objective runs, names who is missing, and writes its table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "objective.py"
DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
FIGURES = ("p20_s", "p50_s", "p80_s", "ratio", "peak_bytes", "error_hidden", "error_weight")
ABOUT = ("run", "device", "card", "processor", "python", "torch", "trl", "liger_kernel", "cut_cross_entropy", "commit")


def loaded(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(script.parent))
    spec = importlib.util.spec_from_file_location(f"{script.stem}_benchmark", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(SCRIPT, monkeypatch)


def row(what: str, run: str, **other: Any) -> dict[str, Any]:
    times = {"p20_s": 0.5, "p50_s": 1.0, "p80_s": 2.0, "ratio": 1.0}
    about = {"shape": "tiny", "dtype": "float32", "device": "cpu, 1 thread", "commit": "abc", "repeats": 5, "run": run}
    return {"what": what, **times, **about, **other}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.mark.slow
def test_rows_have_every_column_and_a_missing_rival_is_named(benchmark: ModuleType, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "trl"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('cannot load /secret/place/trl.so')\n")
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    shutil.copy(ROOT / "docs" / "performance.md", page)
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--repeats", "1", "--dtype", "float32"]
    command += ["--out", str(out), "--only", "tailkd tail_aware", "--only", "TRL forward KL"]
    path = os.pathsep.join([str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = {one["what"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["bare products", "tailkd tail_aware", "TRL forward KL"]
    assert all(rows["tailkd tail_aware"][name] is not None for name in FIGURES)
    assert rows["tailkd tail_aware"]["error_weight"] < 1e-5
    assert rows["bare products"]["ratio"] == 1.0
    assert rows["TRL forward KL"]["skipped"] == "ImportError: cannot load ..."
    assert all(name in one for one in rows.values() for name in ABOUT)
    assert "left out: ImportError" in done.stdout
    benchmark.main(["--table", "--out", str(out), "--page", str(page)])
    text = page.read_text()
    assert "| tailkd tail_aware | " in text
    assert "- TRL forward KL: `ImportError: cannot load ...`" in text
    benchmark.main(["--table", "--out", str(out), "--page", str(page)])
    assert page.read_text() == text


def test_the_table_shows_the_last_run_and_who_is_ahead(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = [row("bare products", "1"), row("tailkd none", "1", ratio=7.77), row("bare products", "2")]
    rows += [row("tailkd none", "2", peak_bytes=2_000_000), row("bare products", "1", dtype="bfloat16")]
    rival = {"beside": "tailkd none", "to_ours": 0.5, "peak_bytes": 3_000_000, "note": "rivals"}
    rows.insert(4, row("cut-cross-entropy CLM", "2", **{**rival, "p50_s": 0.5}))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.MARKS[0]}\nold\n{benchmark.MARKS[1]}\nafter\n")
    benchmark.write_table(written(tmp_path / "rows.jsonl", rows), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "7.77" not in text
    assert "| cut-cross-entropy CLM | 0.5 | 0.5 | 2 | 1.00 | 0.50 | 3 | – | – |" in text
    assert "Ahead of our row of the same loss, in time: cut-cross-entropy CLM." in text
    assert text.count("### 2 x 64 positions") == 2


def test_a_page_without_marks_is_left_alone(benchmark: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    with pytest.raises(SystemExit, match="once each"):
        benchmark.write_table(written(tmp_path / "rows.jsonl", [row("bare products", "1")]), page)
    assert page.read_text() == "mine"


def test_dense_rows_that_do_not_fit_are_cut_to_one_row(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark.Case.drawn(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    dense, lean = benchmark.EAGER[0], benchmark.OURS[0]
    assert benchmark.fitted(dense, case) == (case, 1)
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 1 << 20)
    part, scale = benchmark.fitted(dense, case)
    assert (part.labels.shape, scale) == ((1, 64), 2)
    assert part.weight.data_ptr() == case.weight.data_ptr()
    assert benchmark.fitted(lean, case) == (case, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these shapes")
def test_shapes_of_a_gpu_are_refused_on_a_cpu(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit, match="the shape qwen wants a GPU"):
        benchmark.main(["--shape", "qwen"])


def test_a_wrong_loss_is_not_timed(benchmark: ModuleType) -> None:
    case = benchmark.Case.drawn(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    with pytest.raises(AssertionError, match="tailkd none is wrong by"):
        benchmark.gate(case, {"tailkd none": (1e-7, 3e-3)})


@pytest.mark.slow
def test_a_whole_step_beside_its_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = loaded(SCRIPT.with_name("step.py"), monkeypatch)
    monkeypatch.setattr(step, "RESULTS", tmp_path / "step.jsonl")
    monkeypatch.setattr(step, "PAGE", tmp_path / "page.md")
    step.PAGE.write_text("before\n" + "\n".join(step.MARKS) + "\nafter\n")
    monkeypatch.setattr(step.memory_peak, "in_process", lambda script, words: 7_000_000)
    options = ["--shape", "tiny", "--repeats", "1", "--checkpointing", "--out", str(step.RESULTS)]
    step.main([*options, "--profile", str(tmp_path / "profile.txt")])
    rows = [json.loads(line) for line in step.RESULTS.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["floor", "tailkd tail_aware", "tailkd forward_kl", "tailkd none"]
    assert all(row["processor_ratio"] > 0 and row["grown_bytes"] == 7_000_000 for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    step.main(["--table"])
    page = step.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| tailkd tail_aware |" in page
    assert "activations checkpointed" in page


def tiny(module: ModuleType) -> Any:
    options = {"shape": "tiny", "dtype": "float32", "rows": None, "compile": False, "checkpointing": False}
    return module.Bench(argparse.Namespace(**options))


@pytest.mark.parametrize("name", ["Trainer, eager KL", pytest.param("TRL GKD", marks=pytest.mark.slow)])
def test_a_trainer_takes_a_step_when_it_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate" if "Trainer" in name else "trl")
    step = loaded(SCRIPT.with_name("step.py"), monkeypatch)
    bench = tiny(step)
    competitors = step.Competitors(bench, ["floor", name])  # its loss is ours
    assert not competitors.missing
    mine, rival = bench.student.plain.lm_head.weight, competitors.trainers[0]
    first = mine.detach().clone()
    competitors.steps[name]()
    assert torch.equal(mine, first)  # it has a student of its own
    competitors.steps[name]()
    assert rival.trainer.state.global_step == 2
    assert 0 < (rival.trainer.model.lm_head.weight - first).abs().max() < 1e-3
    competitors.close()
    assert not rival.thread.is_alive()


def test_a_rival_that_cannot_run_is_named_and_one_that_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = loaded(SCRIPT.with_name("step.py"), monkeypatch)

    class Broken:
        add_callback = staticmethod(lambda callback: None)

        def train(self) -> None:
            raise ValueError("no memory")

    def missing(*_: Any) -> Any:
        raise ImportError("no module named trl")

    with pytest.raises(ValueError, match="no memory"):
        step.trainers.StepByStep(Broken()).step()
    monkeypatch.setitem(step.trainers.RIVALS, "TRL GKD", missing)
    assert step.Competitors(tiny(step), ["TRL GKD"]).missing == {"TRL GKD": "ImportError: no module named trl"}
    with pytest.raises(AssertionError, match=r"computes a loss of 1\.1, expected 1"):
        step.assert_same("it", 1.1, 1.0, torch.float32)


def test_turns_are_held_against_those_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = loaded(SCRIPT.with_name("turns.py"), monkeypatch)
    asked: list[str] = []
    times = turns.taken({name: lambda name=name: asked.append(name) for name in "abc"}, 9)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 9)
    assert len({tuple(asked[at : at + 3]) for at in range(0, 27, 3)}) > 1  # another order in another round
    drifting = {"ours": [(2.0, 1.1), (20.0, 1.2), (200.0, 1.3)], "floor": [(1.0, 1.0), (10.0, 1.0), (100.0, 1.0)]}
    assert turns.ratios(drifting, "ours", "floor") == {"ratio": 2.0, "processor_ratio": 1.2}


def test_held_out_evaluation_beside_its_forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heldout = loaded(SCRIPT.with_name("heldout.py"), monkeypatch)
    words = ["--shape", "tiny", "--tokens", "100", "--repeats", "1", "--out", str(tmp_path / "rows.jsonl")]
    heldout.main(words)
    found = json.loads((tmp_path / "rows.jsonl").read_text())
    assert found["tokens"] == 128  # whole rows
    assert found["ratio"] > 0
    monkeypatch.setattr(heldout, "expected", lambda bench, batches: 99.0)
    with pytest.raises(AssertionError, match="evaluation computes a loss of"):
        heldout.main(words)


def test_the_start_is_held_against_what_it_cannot_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    startup = loaded(SCRIPT.with_name("startup.py"), monkeypatch)
    names = ["tailkd --help", startup.LOADING, startup.FIRST_STEP]
    quick = {name: ([sys.executable, "-c", "pass"], 0) for name in names}
    monkeypatch.setattr(startup, "commands", lambda folder, shape: quick)
    startup.main(["--repeats", "1", "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [one["what"] for one in rows] == names
    assert rows[-1]["ratio"] > 0
    late = [{"what": names[0], "p50_s": 0.71}, {"what": names[2], "p50_s": 9.0, "ratio": 1.31, "processor_ratio": 1.31}]
    assert startup.missed(late) == [names[0], names[2]]
    assert startup.missed([one | {"p50_s": 0.1} | ({"ratio": 1.29} if "ratio" in one else {}) for one in late]) == []
    with pytest.raises(AssertionError):
        startup.seconds([sys.executable, "-c", "raise SystemExit(3)"], 0)


@pytest.mark.slow
def test_the_start_of_a_real_run_ends_at_its_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    startup = loaded(SCRIPT.with_name("startup.py"), monkeypatch)
    monkeypatch.setenv("TAILKD_CACHE", str(tmp_path))  # and set back
    command, expected = startup.commands(tmp_path, "tiny")[startup.FIRST_STEP]
    startup.seconds(command, expected)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["header", "evaluation", "evaluation"]


@pytest.mark.slow
def test_cost_of_larger_corpora_and_of_longer_runs(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = loaded(SCRIPT.with_name("growth.py"), monkeypatch)
    rows = growth.corpus_rows(tiny(growth.whole_step), tmp_path, (20_000, 60_000), 1)
    assert [one["prepared_tokens"] for one in rows] == [20_000, 60_000]
    assert all(0 < one["batch_s"] < one["step_s"] for one in rows)

    def write_pair(folder: Path, shape: str) -> Path:
        for section, key in (("training", "save_every_tokens"), ("evaluate", "every_tokens")):
            recipe[section][key] = None
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        return folder / "recipe.yaml"

    monkeypatch.setattr(growth.startup, "write_pair", write_pair)
    found = growth.steps_row(tmp_path, 6)
    assert found["steps"] == 3  # of twice as many rows
    assert found["last_memory_bytes"] > 1e6
    assert "prepared tokens" in growth.spoken(rows[0])
    assert "3 steps" in growth.spoken(found)


def test_estimates_of_a_cache_are_held_against_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    variance = loaded(SCRIPT.with_name("cache_variance.py"), monkeypatch)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 3, 60, generator=generator) for _ in range(2))
    rows = variance.measured(student, teacher, 150)
    assert [row["objective"] for row in rows] == list(variance.OBJECTIVES)
    for row in rows:
        assert abs(row["mean_off_by_standard_errors"]) < 3
        assert abs(row["gradient_off_by_standard_errors"]) < 3
        assert row["gradient_to_formula"] == pytest.approx(1, abs=0.2)
        assert row["value_to_formula"] == pytest.approx(1, abs=0.4)
    assert variance.wrong(row | {"value_to_formula": 1.11, "mean_off_by_standard_errors": -3.1}) == [
        "mean_off_by_standard_errors",
        "value_to_formula",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (DATA / "models" / "stories260k").is_dir(), reason="TAILKD_DATA names no data folder")
def test_estimates_of_a_real_teacher_are_as_the_formulas_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variance = loaded(SCRIPT.with_name("cache_variance.py"), monkeypatch)
    variance.main([str(DATA), "--out", str(tmp_path / "rows.jsonl")])  # ends with an error where they are not
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(variance.OBJECTIVES)


def test_a_cache_is_written_and_read_beside_what_it_is_compared_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = loaded(ROOT / "benchmarks" / "cache.py", monkeypatch)
    out = tmp_path / "rows.jsonl"
    benchmark.main(["speed", "--shape", "tiny", "--repeats", "1", "--out", str(out)])
    (found,) = map(json.loads, out.read_text().splitlines())
    assert found["bytes a token"] == 174
    assert found["tokens"] == 64
    for name in ("speed of writing / of the forward pass", "step from the cache / of cross-entropy"):
        assert found[f"{name}, by the clock"] > 0
        assert found[f"{name}, of the processor"] > 0
    low, high = benchmark.interval([0.1, 0.2, 0.3])
    assert (low + high) / 2 == pytest.approx(0.2)
    assert high - low == pytest.approx(2 * 4.3027 * 0.1 / 3**0.5, rel=1e-4)
