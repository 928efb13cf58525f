"""The whole way with a corpus, tokenizer, teacher and student that the project has never seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from safetensors.torch import load_file

import tailkd
from tailkd import folder
from tailkd import run as way
from tailkd.errors import Refusal
from tailkd.report.record import Run

MEASURES = {
    "tokens",
    "cross_entropy",
    "kl",
    "head_kl",
    "tail_kl",
    "full_ece",
    "ece",
    "top1_accuracy",
    "top1_agreement",
    "mismatch_rate",
    "acceptance",
    "tail_mass",
}


@pytest.fixture(scope="module")
def finished(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tailkd.distill(small(stranger, tmp_path_factory.mktemp("finished") / "run"))


def small(stranger: SimpleNamespace, out: Path, **objective: Any) -> dict[str, Any]:
    return {
        "name": "stranger",
        "out": str(out),
        "teacher": {"model": str(stranger.teacher)},
        "student": {"model": str(stranger.student)},
        "data": {"train": {"path": str(stranger.corpus), "text": "body"}, "context": 48},
        "objective": objective or {"divergence": "tail_aware", "top_k": 5, "clm_weight": 0.1},
        "training": {
            "tokens": 6_000,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-2,
            "seed": 3,
            "save_every_tokens": 2_000,
        },
        "evaluate": {"every_tokens": 2_000, "tokens": 2_000},
    }


def test_the_run_folder(finished: Run) -> None:
    assert {p.name for p in finished.folder.iterdir()} == set(folder.RUN_FILES)
    evaluation = finished.evaluation
    assert evaluation["format"] == 1
    for role in ("teacher", "student_before", "student"):
        assert set(evaluation[role]) == MEASURES
        assert set(evaluation[role]["tail_mass"]) == {"1", "5", "10", "20"}
    assert evaluation["student"]["kl"] < 0.95 * evaluation["student_before"]["kl"]
    assert evaluation["student"]["kl"] == pytest.approx(
        evaluation["student"]["head_kl"] + evaluation["student"]["tail_kl"], rel=1e-5
    )
    assert "<svg" in (finished.folder / "report.html").read_text()
    assert finished.environment["versions"]["torch"] == torch.__version__


def test_metrics(finished: Run) -> None:
    steps = [r for r in finished.metrics if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 17))  # ceil(6000 / (8 * 48))
    assert 0.9 * 16 * 8 * 48 < steps[-1]["tokens"] <= 16 * 8 * 48
    keys = {"loss", "clm", "divergence", "head_kl", "tail_kl", "learning_rate", "gradient_norm", "tokens"}
    assert keys | {"tokens_per_second", "floored_rows"} <= set(steps[0])
    for record in steps:
        assert record["loss"] == pytest.approx(0.1 * record["clm"] + record["divergence"], rel=1e-5)
    trained = [r["tokens_trained"] for r in finished.evaluations() if r["role"] == "student"]
    assert trained[0] == 0
    assert trained[-1] == steps[-1]["tokens"]
    assert trained == sorted(set(trained))
    assert len(trained) == 4


def test_the_student_loads_with_plain_transformers_and_generates(finished: Run) -> None:
    done = builders.fresh_python(f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished.student)!r})
tokenizer = AutoTokenizer.from_pretrained({str(finished.student)!r})
ids = tokenizer("the river", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]))
assert "tailkd" not in sys.modules
""")
    assert done.stdout.startswith("the river")


def test_the_saved_tokenizer_gives_the_ids_it_was_trained_with(finished: Run, stranger: SimpleNamespace) -> None:
    from transformers import AutoTokenizer

    texts = [json.loads(line)["body"] for line in stranger.corpus.open()][:100]
    saved = AutoTokenizer.from_pretrained(finished.student)
    assert saved(texts)["input_ids"] == stranger.tokenizer(texts)["input_ids"]


def test_evaluate_reads_the_saved_student(finished: Run) -> None:
    before = finished.evaluation
    again = way.evaluate(Run(finished.folder), lambda message: None)
    for key in MEASURES - {"tail_mass"}:
        assert again.evaluation["student"][key] == pytest.approx(before["student"][key], rel=1e-6), key


def test_two_runs_give_the_same_numbers(finished: Run, stranger: SimpleNamespace, tmp_path: Path) -> None:
    again = tailkd.distill(small(stranger, tmp_path / "run"))
    assert again.evaluation == finished.evaluation
    assert losses(again) == losses(finished)


def losses(run: Run) -> list[tuple[float, float]]:
    return [(r["loss"], r["gradient_norm"]) for r in run.metrics if r["kind"] == "step"]


def test_a_run_cut_off_goes_on_to_the_same_end(
    finished: Run, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    real = way.train.__globals__["train_step"]

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    recipe = small(stranger, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setitem(way.train.__globals__, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            tailkd.distill(recipe)
    resumed = tailkd.distill(recipe)
    assert resumed.evaluation == finished.evaluation
    assert losses(resumed) == losses(finished)
    ours, theirs = (load_file(r.student / "model.safetensors") for r in (resumed, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_left_alone_and_fresh_starts_anew(
    finished: Run, stranger: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    recipe = small(stranger, tmp_path / "run")
    stamp = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert tailkd.distill(recipe).evaluation == finished.evaluation
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert tailkd.distill(recipe, fresh=True).evaluation == finished.evaluation
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns != stamp


def test_a_folder_that_holds_something_else_is_refused(
    finished: Run, stranger: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=r"training.seed: was 3, is 4\n"):
        tailkd.distill(small(stranger, finished.folder), **{"training.seed": 4})
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(Refusal, match=r"holds other files and no recipe.yaml"):
        tailkd.distill(small(stranger, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("divergence", ["none", "reverse_kl", "decoupled_kd"])
def test_rivals_differ_in_a_line(divergence: str, stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = small(stranger, tmp_path / "run", divergence=divergence)
    recipe["training"]["tokens"] = 1_000
    recipe["evaluate"] = {"tokens": 500}
    recipe["training"]["save_every_tokens"] = None
    run = tailkd.distill(recipe)
    assert run.evaluation["student"]["cross_entropy"] < run.evaluation["student_before"]["cross_entropy"]
    assert ("divergence" in run.metrics[-2]) == (divergence != "none")


def test_without_a_teacher(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = small(stranger, tmp_path / "run", divergence="none")
    recipe |= {"teacher": None, "training": {"tokens": 800, "batch_size": 4}, "evaluate": {"tokens": 500}}
    run = tailkd.distill(recipe)
    assert run.evaluation["teacher"] is None
    assert run.evaluation["student"]["kl"] is None


def test_begin_tokens_are_a_rule(stranger: SimpleNamespace, tmp_path: Path) -> None:
    def begin(bos: str, student: Path = stranger.student, teacher: Path = stranger.teacher) -> int | None:
        recipe = small(stranger, tmp_path)
        recipe["data"]["bos"] = bos
        recipe |= {"student": {"model": str(student)}, "teacher": {"model": str(teacher)}}
        return way.read_vocabulary(way.recipe_file.read(recipe)).begin

    assert (begin("auto"), begin("always"), begin("never")) == (None, 0, None)
    tokenizer = builders.build_tokenizer(["a"] * 3)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    both = builders.save_model(tmp_path / "begins", tokenizer)
    assert (begin("auto", both, both), begin("never", both, both)) == (0, None)


BAD_MODELS = {
    "permuted": r"do not share one vocabulary: \d+ of 400 ids carry another token",
    "another tokenizer": r"do not share one vocabulary",
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_vocabularies_that_are_not_one_are_refused_before_anything_is_written(
    kind: str, stranger: SimpleNamespace, tmp_path: Path
) -> None:
    if kind == "permuted":
        vocabulary = json.loads((stranger.student / "tokenizer.json").read_text())
        ids = vocabulary["model"]["vocab"]
        a, b = sorted(ids)[100], sorted(ids)[200]
        ids[a], ids[b] = ids[b], ids[a]
        shutil.copytree(stranger.student, tmp_path / "student")
        (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(vocabulary))
    else:
        other = builders.build_tokenizer(["entirely different words in here"] * 5, size=290)
        builders.save_model(tmp_path / "student", other, vocabulary=400)
    recipe = small(stranger, tmp_path / "run") | {"student": {"model": str(tmp_path / "student")}}
    with pytest.raises(Refusal, match=BAD_MODELS[kind]):
        tailkd.distill(recipe)
    assert not (tmp_path / "run").exists()


def test_padded_rows_are_sliced_off_on_both_sides(stranger: SimpleNamespace, tmp_path: Path) -> None:
    builders.save_model(tmp_path / "padded", stranger.tokenizer, vocabulary=448)
    recipe = small(stranger, tmp_path / "run") | {"student": {"model": str(tmp_path / "padded")}}
    recipe["training"] = {"tokens": 800, "batch_size": 4}
    recipe["evaluate"] = {"tokens": 500}
    run = tailkd.distill(recipe)
    assert load_file(run.student / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 448
    assert run.evaluation["student"]["cross_entropy"] > 0


def test_held_out_documents_are_never_trained_on(stranger: SimpleNamespace, tmp_path: Path) -> None:
    lines = stranger.corpus.read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[:7]))
    recipe = small(stranger, tmp_path / "run")
    checked = way.recipe_file.read(recipe)
    shared = way.read_vocabulary(checked)
    for heldout in ({"fraction": 0.1}, {"path": str(tmp_path / "held.jsonl"), "text": "body"}):
        recipe["data"]["heldout"] = heldout
        train, held = way.prepare(way.recipe_file.read(recipe), shared, lambda message: None)
        hashes = [set(rows.store.hashes[rows.documents].tolist()) for rows in (train, held)]
        assert hashes[0]
        assert hashes[1]
        assert not hashes[0] & hashes[1]
    assert len(train.documents) == 113
