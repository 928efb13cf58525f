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
from tailkd import folder, pair, parts, recipe_file
from tailkd import run as way
from tailkd.bill import bill, operations
from tailkd.errors import Refusal
from tailkd.recipe_models import WeightedTeacher
from tailkd.report.record import Run

MEASURES = {
    "tokens",
    "cross_entropy",
    "entropy",
    "kl",
    "head_kl",
    "tail_kl",
    "full_ece",
    "ece",
    "log_ece",
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
    assert {p.name for p in finished.folder.iterdir()} == set(folder.RUN_FILES) - {
        "crash.json",
        "tasks.json",
        "tasks",
        "track.json",
        "tensorboard",
        "wandb",
    }
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
    real = way.Step.__call__

    def dies(step: Any, batch: Any) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return real(step, batch)

    recipe = small(stranger, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(way.Step, "__call__", dies)
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


def test_outputs_that_cannot_be_written_are_refused_before_a_model_is_loaded(
    stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.load, "load_model", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"file is a file; give another `out`"):
        tailkd.distill(small(stranger, tmp_path / "file"))
    with pytest.raises(Refusal, match=r"run cannot be written"):
        tailkd.distill(small(stranger, Path("/proc/run")))
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Refusal, match=r"need 1.3 MB, the disk has 0.1 MB free.*keep_checkpoints"):
        tailkd.distill(small(stranger, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_choices_that_cannot_run_here_are_refused(stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe = small(stranger, tmp_path / "run")
    recipe["teacher"]["attention"] = "flash_attention_2"
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match=r"teacher.attention is 'flash_attention_2', which needs a GPU"):
            tailkd.distill(recipe)
    recipe = small(stranger, tmp_path / "run")
    lines = stranger.corpus.read_text().splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text("".join(lines[:3]))
    recipe["data"]["train"]["path"] = str(tmp_path / "small.jsonl")
    recipe["data"]["heldout"] = {"path": str(stranger.corpus), "text": "body"}
    with pytest.raises(Refusal, match=r"no token is left to train on: 0 documents"):
        tailkd.distill(recipe)
    builders.write_corpus(tmp_path / "small.jsonl", documents=9, field="body", seed=9)
    with pytest.raises(Refusal, match=r"data.heldout has [\d,]+ tokens, more than the [\d,]+ to train on"):
        tailkd.distill(recipe)
    assert not (tmp_path / "run").exists()


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
        return pair.read_vocabulary(recipe_file.read(recipe)).begin

    assert (begin("auto"), begin("always"), begin("never")) == (None, 0, None)
    tokenizer = builders.build_tokenizer(["a"] * 3)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    both = builders.save_model(tmp_path / "begins", tokenizer)
    assert (begin("auto", both, both), begin("never", both, both)) == (0, None)


def test_a_begin_token_that_is_not_there_is_refused(stranger: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = builders.build_tokenizer(["a"] * 3)
    tokenizer.bos_token = None
    both = str(builders.save_model(tmp_path / "no-begin", tokenizer))
    recipe = small(stranger, tmp_path) | {"student": {"model": both}, "teacher": {"model": both}}
    recipe["data"]["bos"] = "always"
    with pytest.raises(Refusal, match=r"data.bos is 'always' but the tokenizer has no begin token"):
        pair.read_vocabulary(recipe_file.read(recipe))


def test_the_teachers_tokenizer_serves_a_student_without_one(stranger: SimpleNamespace, tmp_path: Path) -> None:
    bare = str(builders.save_model(tmp_path / "bare", None, vocabulary=400))
    recipe = small(stranger, tmp_path) | {"student": {"model": bare}}
    assert pair.read_vocabulary(recipe_file.read(recipe)).usable == 400
    with pytest.raises(Refusal, match=r"neither the teacher's nor the student's folder holds a tokenizer"):
        pair.read_vocabulary(recipe_file.read(recipe | {"teacher": {"model": bare}}))
    alone = small(stranger, tmp_path, divergence="none") | {"student": {"model": bare}, "teacher": None}
    with pytest.raises(Refusal, match=r"student.model: '.*bare' holds no tokenizer"):
        pair.read_vocabulary(recipe_file.read(alone))


def test_a_run_without_an_end_cannot_be_measured_again(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"holds no finished run: run `tailkd distill`"):
        way.evaluate(Run(tmp_path), lambda message: None)


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
    checked = recipe_file.read(recipe)
    shared = pair.read_vocabulary(checked)
    for heldout in ({"fraction": 0.1}, {"path": str(tmp_path / "held.jsonl"), "text": "body"}):
        recipe["data"]["heldout"] = heldout
        train, held = parts.prepare(recipe_file.read(recipe), shared, lambda message: None)
        hashes = [set(rows.store.hashes[rows.documents].tolist()) for rows in (train, held)]
        assert hashes[0]
        assert hashes[1]
        assert not hashes[0] & hashes[1]
    assert len(train.documents) == 113


def test_what_it_costs_is_written_down_at_its_start(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of `tailkd ledger`; a model that the ledger cannot read has none, and is trained."""
    recipe = recipe_file.read(finished.folder / "recipe.yaml")
    usable = 400
    for several in (
        recipe,
        recipe.model_copy(update={"teacher": (WeightedTeacher(model=str(recipe.one_teacher.model)),) * 2}),
    ):  # type: ignore[union-attr]
        found, whole = operations(several, usable=usable), bill(several, usable=usable).as_dict()
        assert found == {key: whole[key] for key in found}
    assert finished.bill == {"format": 1, **operations(recipe, usable=usable)}

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a family unheard of")

    monkeypatch.setattr(way, "operations", fail)
    parts = SimpleNamespace(recipe=recipe, student=SimpleNamespace(usable=usable), ranks=SimpleNamespace(device=None))
    way._write_bill(Run(tmp_path), parts)  # type: ignore[arg-type]
    assert Run(tmp_path).bill is None
