"""Several sources in whole runs: what is held out, in which order it is shown, what is said; and the documentation."""

from __future__ import annotations

import json
import re
import signal
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import running
from ruamel.yaml import YAML
from typer.testing import CliRunner

import tailkd
from tailkd import cli, parts, recipe_file
from tailkd.data.mixture import Mixture
from tailkd.data.packing import IGNORED
from tailkd.errors import Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.report.record import Run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def several(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """Three sources of 120, 40 and 80 documents; the last has 30 of the first's too."""
    recipe = running.small(stranger, tmp_path / "run")
    for name, documents, seed in (("large", 120, 1), ("small", 40, 2), ("mixed", 50, 3)):
        builders.write_corpus(tmp_path / f"{name}.jsonl", documents=documents, seed=seed)
    shared = (tmp_path / "large.jsonl").read_text().splitlines(keepends=True)[:30]
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.writelines(shared)
    recipe["data"]["train"] = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("large", "small", "mixed")]
    recipe["data"]["store"] = str(tmp_path / "store")
    return recipe


def weighted(recipe: dict[str, Any], *weights: float) -> dict[str, Any]:
    train = [{**one, "weight": weight} for one, weight in zip(recipe["data"]["train"], weights, strict=True)]
    return {**recipe, "data": {**recipe["data"], "train": train}}


def built(recipe: dict[str, Any], said: list[str] | None = None) -> parts.Parts:
    return parts.build(recipe_file.read(recipe), lambda message: None if said is None else said.append(message))


def test_a_run_on_several_sources(several: dict[str, Any]) -> None:
    run = tailkd.distill(weighted(several, 2, 1, 1))
    sources = run.data["sources"]
    assert list(sources) == ["large", "small", "mixed"]
    assert sum(one["tokens"] for one in sources.values()) == run.data["train"]["tokens"]
    samples = 12 * 8
    for one, share in zip(sources.values(), (2, 1, 1), strict=True):
        assert one["epochs"] == pytest.approx(samples * share / 4 / -(-one["tokens"] // 24), rel=0.02)
    for role in ("teacher", "student_before", "student"):
        measures = run.evaluation[role]
        by_source = measures["sources"]
        assert set(by_source) == {"large", "small", "mixed"}
        assert sum(one["tokens"] for one in by_source.values()) == measures["tokens"]
        for name in ("cross_entropy", "kl", "top1_accuracy"):
            mean = sum(one["tokens"] * one[name] for one in by_source.values()) / measures["tokens"]
            assert mean == pytest.approx(measures[name])
    assert "sources" in run.heldout["student"]["measures"]
    assert re.search(r"\| small \| [\d,]+ \| 5\.\d{4} \| \d\.\d{4} \|", (run.folder / "README.md").read_text())
    for name in ("small", "mixed"):
        tokens, one = f"{sources[name]['tokens']:,}", by_source[name]
        measures = rf"{one['cross_entropy']:.4f} \| {one['kl']:.4f} \|"
        row = rf"\| `{name}\.jsonl` \| \d+ \| {tokens} \| [\d.]+ \| {measures}"
        assert re.search(row, (run.student / "README.md").read_text())
    done = CliRunner().invoke(cli.app, ["evaluate", str(run.folder)])
    assert done.exit_code == 0, done.output
    assert Run(run.folder).evaluation["student"] == run.evaluation["student"]


def test_measures_of_a_source_are_those_of_its_rows_alone(several: dict[str, Any]) -> None:
    several["evaluate"] = {"tokens": None, "batch_size": 4}
    together = built(several)
    found = together.measure(together.student).measures["sources"]
    assert isinstance(together.heldout_rows, Mixture)
    for name, rows in zip(together.heldout_rows.names, together.heldout_rows.parts, strict=True):
        alone = parts.Parts(
            together.recipe, together.tokenizer, together.student, together.teacher, rows, rows
        ).measure(together.student)
        assert found[name]["tokens"] == rows.predicted
        assert found[name]["kl"] == pytest.approx(alone.measures["kl"], rel=1e-6)
        assert found[name]["tail_mass"] == pytest.approx(alone.measures["tail_mass"], rel=1e-6)


@pytest.mark.parametrize("weights", [(), (2, 1, 1)])
def test_killed_and_resumed_it_is_the_same_run(
    several: dict[str, Any], weights: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = weighted(several, *weights) if weights else several
    whole = tailkd.distill(recipe, out=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(70, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(recipe)
    resumed = tailkd.distill(recipe, **{"training.micro_batch_size": 8 if weights else 4})
    if weights:
        assert [one[:3] for one in running.steps(resumed)] == [one[:3] for one in running.steps(whole)]
    else:
        running.assert_same(resumed, whole)


def test_duplicates_do_not_straddle(several: dict[str, Any]) -> None:
    several["data"]["heldout"] = {"fraction": 0.3}
    made = built(several)
    assert isinstance(made.train_rows, Mixture)
    assert isinstance(made.heldout_rows, Mixture)
    train, held = (
        np.concatenate([rows.store.hashes[rows.documents] for rows in side.parts])
        for side in (made.train_rows, made.heldout_rows)
    )
    assert not np.isin(train, held).any()
    documents = Counter(train.tolist()) + Counter(held.tolist())
    assert sum(documents.values()) == 120 + 40 + 80
    assert sum(count == 2 for count in documents.values()) == 30


def test_a_small_source_does_not_hold_out_what_a_large_one_trains_on(several: dict[str, Any], tmp_path: Path) -> None:
    """Of two documents one is held out, however small the share; the other source has them all."""
    lines = (tmp_path / "large.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text("".join(lines[:2]))
    several["data"] |= {"train": several["data"]["train"][:2], "heldout": {"fraction": 0.02}}
    made = built(several)
    assert isinstance(made.train_rows, Mixture)
    assert isinstance(made.heldout_rows, Mixture)
    held = made.heldout_rows.parts[1].store.hashes[made.heldout_rows.parts[1].documents]
    assert len(held) == 1
    assert not np.isin(made.train_rows.parts[0].store.hashes[made.train_rows.parts[0].documents], held).any()


def test_a_heldout_corpus_is_trained_on_from_no_source(several: dict[str, Any], tmp_path: Path) -> None:
    lines = (tmp_path / "large.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "exam.jsonl").write_text("".join(lines[:20]))
    several["data"]["heldout"] = {"path": str(tmp_path / "exam.jsonl")}
    made = built(several)
    assert made.data["train"]["documents"] == 120 + 40 + 80 - 2 * 20
    assert "sources" not in made.measure(made.student).measures


def test_every_row_of_every_source_is_shown_once_an_epoch(several: dict[str, Any]) -> None:
    made = built(several)
    rows = made.train_rows
    assert isinstance(rows, Mixture)
    shown = [rows[rows.row_shown(sample, 3)] for sample in range(len(rows))]
    seen = Counter(label for row in shown for label in row.labels.tolist() if label != IGNORED)
    stores = [part.store for part in rows.parts]
    there = Counter(
        token
        for part, store in zip(rows.parts, stores, strict=True)
        for document in part.documents
        for token in store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()
    )
    assert sum(there.values()) - sum(seen.values()) == (3 if rows.parts[0].begin is None else 0)
    order = [rows.source_of(rows.row_shown(sample, 3)) for sample in range(len(rows) // 4)]
    assert {0, 1, 2} == set(order)


def test_f30_one_of_several_sources_is_shortened(
    several: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SplitModel, "__call__", running.on_call(70, running.send(signal.SIGTERM)))
        with pytest.raises(Preempted):
            tailkd.distill(several)
    path = tmp_path / "small.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-7]))
    with pytest.raises(Refusal, match=r"was saved by another recipe:\n  data \(content\): was '[0-9a-f]{32}', is "):
        tailkd.distill(several)


def test_a_zip_of_objects_is_trained_on(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "math.zip", "w") as archive:
        for number, line in enumerate(stranger.corpus.open()):
            text = json.loads(line)["body"]
            archive.writestr(f"math/{number:03}.json", json.dumps({"topic;": "Algebra", "message_2": text}, indent=1))
    recipe["data"]["train"] = {"path": str(tmp_path / "math.zip"), "text": "message_2"}
    assert tailkd.distill(recipe).finished


# ----- what is refused


def problems(recipe: dict[str, Any], train: Any, **data: Any) -> str:
    with pytest.raises(Refusal) as caught:
        recipe_file.read({**recipe, "data": {**recipe["data"], "train": train, **data}})
    return str(caught.value)


def test_recipes_that_do_not_go_together(several: dict[str, Any]) -> None:
    first, second, _ = several["data"]["train"]
    assert "data.train: give all sources a weight, or none; small came without" in problems(
        several, [{**first, "weight": 1}, second]
    )
    assert "data.train: two sources are called large; give each its own name" in problems(several, [first, first])
    assert "data.train: weight has no meaning for a single source" in problems(several, {**first, "weight": 1})
    assert "data.train.1.weight: expected greater than 0; came 0" in problems(several, [first, {**second, "weight": 0}])
    assert "data.train.1.wieght: unknown key; did you mean 'weight'?" in problems(several, [first, {"wieght": 1}])
    assert "data.train.1: expected one of path or hub; came none" in problems(several, [first, {"name": "a"}])
    assert "data.train.0.path: no file, folder or match at '/nowhere'" in problems(several, [{"path": "/nowhere"}])
    assert "data.train: expected" in problems(several, [])
    with_forms = problems(several, [first, {**second, "prompt": "q"}])
    assert "data.train.1.prompt: needs completion beside it, the name of its field" in with_forms
    select = {"reference": several["teacher"]["model"]}
    assert "data.select: chooses among the rows of one source; data.train names 2" in problems(
        several, [first, second], select=select
    )
    tokens = {**several, "objective": {**several["objective"], "tokens": select}}
    assert "objective.tokens: chooses among the rows of one source; data.train names 2" in problems(
        tokens, [first, second]
    )
    writing = {**several, "generate": {"out": "out.jsonl", "prefix_tokens": 5}}
    assert "generate.prompts: is needed where data.train names several sources; it names 2" in problems(
        writing, [first, second]
    )
    writing["generate"] = {"out": "out.jsonl", "prompts": {"path": first["path"], "text": "text"}}
    assert recipe_file.read(writing).generate is not None
    sets = {"sets": [{"path": "/nowhere"}]}
    assert "data.overlap.sets.0.path: no file, folder or match" in problems(several, first, overlap=sets)


def test_a_source_of_which_nothing_is_left(several: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_text((tmp_path / "large.jsonl").read_text())
    several["data"]["heldout"] = {"path": str(tmp_path / "large.jsonl")}
    with pytest.raises(Refusal, match=r"source 'large' has no token left to train on: all its documents are held out"):
        built(several)
    with pytest.raises(Refusal, match=r"source 'mixed' has weight 1e-05 of 2.00001, less than one row in 4,096"):
        built(
            {
                **weighted(several, 1, 1, 1e-5),
                "data": weighted(several, 1, 1, 1e-5)["data"] | {"heldout": {"fraction": 0.1}},
            }
        )


# ----- verbs


def called(recipe: dict[str, Any], verb: str, tmp_path: Path, *arguments: str) -> Any:
    path = tmp_path / "recipe.yaml"
    YAML().dump(recipe, path)
    done = CliRunner().invoke(cli.app, [verb, str(path), "--json", *arguments])
    assert done.exit_code == 0, done.output + str(done.exception)
    return json.loads(done.stdout)


def test_prepare_says_what_it_made_and_distill_uses_it(
    several: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = called(several, "prepare", tmp_path)
    assert [one["documents"] for one in found["sources"].values()] == [120, 40, 80]
    folders = {Path(one["folder"]) for one in found["sources"].values()}
    assert folders == {path for path in (tmp_path / "store").iterdir() if path.is_dir()}
    assert called(several, "prepare", tmp_path, "data.processes=3") == found
    capfd.readouterr()
    assert tailkd.distill(several).data["train"] == found["train"]
    assert ": tokens: " not in capfd.readouterr().err
    (next(iter(folders)) / "hashes.bin").write_bytes(b"\0" * (next(iter(folders)) / "hashes.bin").stat().st_size)
    with pytest.raises(Refusal, match=r"hashes.bin is damaged"):
        CliRunner().invoke(cli.app, ["prepare", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
    several["data"] |= {"heldout": several["data"]["train"].pop(), "store": str(tmp_path / "other")}
    assert list(called(several, "prepare", tmp_path)["sources"]) == ["large", "small", "(held out)"]


def test_check_says_how_often_each_source_is_seen(several: dict[str, Any], tmp_path: Path) -> None:
    corpus = called(several, "check", tmp_path)["corpus"]
    tokens = [one["tokens"] for one in corpus["sources"].values()]
    budget = several["training"]["tokens"]
    expected = budget / (0.9 * sum(tokens))
    assert [one["epochs"] for one in corpus["sources"].values()] == pytest.approx([expected] * 3)
    mixed = weighted(several, 2, 1, 1)
    mixed["data"]["train"][1]["tokens"] = 1000
    corpus = called(mixed, "check", tmp_path)["corpus"]["sources"]
    assert corpus["small"]["tokens"] == 1000
    assert corpus["large"]["epochs"] == pytest.approx(budget / 2 / (0.9 * tokens[0]))
    assert corpus["small"]["epochs"] == pytest.approx(budget / 4 / (0.9 * 1000))


def test_documents_that_overlap_are_left_out_and_counted(
    several: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (tmp_path / "large.jsonl").open()]
    questions = [" ".join(line["text"].split()[:14]).upper() for line in lines[:5]]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    said: list[str] = []
    plain = built(several).data["train"]["documents"]
    several["data"]["overlap"] = {"sets": [{"path": str(tmp_path / "exam.jsonl"), "text": "question"}]}
    left = built(several, said)
    assert "data: 10 of 240 documents share 13 words with an evaluation set: left out of training" in said
    held = {h for rows in parts.parts_of(left.heldout_rows) for h in rows.store.hashes[rows.documents].tolist()}
    assert plain - 10 <= left.data["train"]["documents"] <= plain - 10 + 2 * len(held)
    assert left.data["train"]["documents"] < plain
    several["data"]["overlap"]["drop"] = False
    assert built(several, said).data["train"]["documents"] == plain
    assert "trained on all the same" in said[-1]
    found = called(several, "check", tmp_path)["corpus"]["sources"]
    assert [one["sampled_overlaps"] for one in found.values()] == [5, 0, 5]


# ----- documentation


def examples() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sources.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_examples_of_the_documentation(
    number: int, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for seed, name in enumerate(("arxiv", "github")):
        builders.write_corpus(tmp_path / "corpus" / f"{name}.jsonl", documents=80, seed=seed)
    line = json.loads((tmp_path / "corpus" / "arxiv.jsonl").read_text().splitlines()[3])
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": line["text"]}) + "\n")
    recipe = running.small(stranger, tmp_path / "run", tokens=2 * 8 * 24, save_every_tokens=None)
    recipe["data"] |= YAML(typ="safe").load(examples()[number])["data"]
    recipe["evaluate"] = {"tokens": 200}
    prepared = called(recipe, "prepare", tmp_path)
    run = tailkd.distill(recipe)
    assert run.data["train"] == prepared["train"]
    assert list(run.data["sources"]) in (["arxiv"], ["arxiv", "code"])
