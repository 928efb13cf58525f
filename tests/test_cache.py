"""`tailkd cache` and what training makes of it: payloads, faults, refusals, whole runs of tiny models."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import running
import torch
from typer.testing import CliRunner

import tailkd
from tailkd import cache, cli, fault, pair, parts, recipe_file
from tailkd import run as way
from tailkd.bill import bill
from tailkd.data.batches import Batch, collate
from tailkd.errors import DataError, Preempted, Refusal
from tailkd.models.head import SplitModel
from tailkd.objective import Cached, Objective, distillation_loss
from tailkd.teacher import cache_writing
from tailkd.teacher.cache import Cache, CachedTeacher, Manifest
from tailkd.teacher.live import LiveTeacher
from tailkd.teacher.shards import Payload, Shard, packed, packed_ids, unpacked_ids

Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_writing, "SHARD_BYTES", 200_000)  # about fifty rows
    monkeypatch.setattr(way, "write_page", lambda *_: None)  # its charts take longer than these runs


@pytest.fixture
def recipe(stranger: SimpleNamespace, tmp_path: Path) -> Recipe:
    made = running.small(stranger, tmp_path / "run")
    return {**made, "cache": {"path": str(tmp_path / "cache")}, "training": {**made["training"], "tokens": 6 * 8 * 24}}


def silent(line: str) -> None:
    """For `say`."""


def written(recipe: Recipe, **settings: Any) -> Path:
    made = {**recipe, "cache": {**recipe["cache"], **settings}}
    cache.write(recipe_file.read(made), silent)
    return Path(made["cache"]["path"])


def reading(recipe: Recipe, folder: Path, *, alone: bool = False) -> Recipe:
    """The recipe of a run that learns from a cache."""
    teacher = {"model": None, "cache": str(folder)} if alone else {**recipe["teacher"], "cache": str(folder)}
    return {**{key: value for key, value in recipe.items() if key != "cache"}, "teacher": teacher}


def in_a_file(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def a_batch(recipe: Recipe, rows: list[int]) -> Batch:
    checked = recipe_file.read(recipe, files=())
    found = parts.prepare(checked, pair.read_vocabulary(checked), silent)[0]
    return collate([found[number] for number in rows], range(len(rows)))


def live(recipe: Recipe) -> LiveTeacher:
    checked = recipe_file.read(recipe, files=())
    model = pair.load_teacher(checked, torch.device("cpu"))
    return LiveTeacher(model, usable=pair.read_vocabulary(checked).usable, fold=checked.vocabulary.fold)


def changed(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ----- what is written


def test_the_verb_writes_every_row_says_so_and_verifies(recipe: Recipe, tmp_path: Path) -> None:
    path = in_a_file(recipe, tmp_path)
    shown = CliRunner().invoke(cli.app, ["cache", str(path)])
    assert shown.exit_code == 0, shown.output
    folder = tmp_path / "cache"
    manifest = Manifest.read(folder)
    assert len(manifest.shards) > 2
    said = re.search(
        r"(\d+) of \d+ different rows are to be written to .*: ([\d.]+) MB, (\d+) bytes a token", shown.stderr
    )
    assert said
    assert int(said[1]) == manifest.total("rows")
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert on_disk == manifest.total("bytes")
    assert float(said[2]) * 1e6 == pytest.approx(on_disk, rel=0.03)
    assert int(said[3]) == 174
    again = CliRunner().invoke(cli.app, ["cache", str(path), "--json"])
    assert "cache: 0 of" in again.stderr
    assert json.loads(again.stdout)["rows"] == manifest.total("rows")
    verified = CliRunner().invoke(cli.app, ["cache", str(path), "--verify"])
    assert verified.exit_code == 0, verified.output
    assert verified.stdout.endswith("all as written\n")


def test_bytes_a_token_at_152_000_ids() -> None:
    """With the row's key and digest on top, at the shortest context of the paper's recipes."""
    payload = Payload("tail", 152_000)
    assert payload.position_bytes + (2 * 16 + 8) / 512 <= 180
    ids = torch.tensor([[0, 1, 255, 256], [65_535, 65_536, 151_999, (1 << 24) - 1]])
    assert torch.equal(unpacked_ids(packed_ids(ids)), ids)


def test_a_row_is_the_teachers_own_numbers_and_its_draws_are_its_own(recipe: Recipe) -> None:
    folder = written(recipe, top_k=7, tail_samples=64)
    batch = a_batch(recipe, [5, 0, 40])
    found = CachedTeacher(Cache(folder))(batch)
    assert isinstance(found, Cached)
    logits = live(recipe)(batch).logits()  # type: ignore[union-attr]
    log_p = logits.double().log_softmax(-1)
    head, ids = log_p.topk(7, dim=-1)
    valid = batch.labels != -100
    assert torch.equal(found.head_ids[valid], ids[valid])
    assert torch.allclose(found.head_log_probabilities.double()[valid], head[valid], atol=1e-5)
    tail = log_p.scatter(-1, ids, -torch.inf)
    assert torch.allclose(found.log_tail_mass.double()[valid], tail.logsumexp(-1)[valid], atol=1e-5)
    renormalised = tail.log_softmax(-1)
    entropy = -(renormalised.exp() * renormalised.masked_fill(renormalised.isinf(), 0)).sum(-1)
    assert torch.allclose(found.tail_entropy.double()[valid], entropy[valid], atol=1e-4)
    assert not (found.tail_ids.unsqueeze(-1) == found.head_ids.unsqueeze(-2))[valid].any()
    # 64 draws at each of 70 positions: how often the tail's likelier half was drawn is as it should be.
    order = renormalised.argsort(-1, descending=True)
    likely = torch.zeros_like(renormalised).scatter(-1, order[..., :60], 1.0)
    expected = (renormalised.exp() * likely).sum(-1)[valid].mean()
    drawn = likely.gather(-1, found.tail_ids)[valid].mean()
    assert abs(drawn - expected) < 4 * (expected * (1 - expected) / (64 * valid.sum())).sqrt()
    # What else was read beside a row changes no more than last digits, and so hardly any draw.
    recipe["cache"]["path"], recipe["evaluate"] = f"{folder}-again", {**recipe["evaluate"], "batch_size": 3}
    again = CachedTeacher(Cache(written(recipe, top_k=7, tail_samples=64)))(a_batch(recipe, [0]))
    assert isinstance(again, Cached)
    assert torch.equal(again.head_ids[0], found.head_ids[1])
    assert (again.tail_ids[0] == found.tail_ids[1]).float().mean() > 0.999
    # Two rows that begin alike have draws of their own.
    uniforms = cache_writing._uniforms(batch, 64)
    assert len(uniforms.unique()) == uniforms.numel()


@pytest.mark.parametrize("payload", ["dense", "hidden"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "tail_aware"])
def test_dense_and_hidden_are_the_live_teacher(recipe: Recipe, payload: str, divergence: str) -> None:
    signal, batch = CachedTeacher(Cache(written(recipe, payload=payload))), a_batch(recipe, [3, 1, 77])
    student = tailkd.Head(torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0)), torch.randn(400, 8))
    objective = Objective(divergence=divergence, top_k=5, temperature=2.0)
    teacher = live(recipe)
    student = student.narrow(teacher.usable) if teacher.usable < 400 else student
    expected, found = (
        distillation_loss(student, one(batch), batch.labels, objective=objective).sum for one in (teacher, signal)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# ----- runs


def test_a_student_of_hidden_states_is_the_live_teachers(recipe: Recipe, tmp_path: Path) -> None:
    hidden = {"pairs": "last", "project": True}
    recipe["objective"] = {"divergence": "tail_aware", "temperature": 2.0, "hidden": hidden}
    folder = written(recipe, payload="hidden")
    expected = tailkd.distill({**recipe, "cache": None})
    found = tailkd.distill(reading(recipe, folder), out=str(tmp_path / "cached"))
    alone = tailkd.distill(reading(recipe, folder, alone=True), out=str(tmp_path / "alone"))
    losses = [[r["loss"] for r in run.metrics if r["kind"] == "step"] for run in (expected, found, alone)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == losses[1]
    assert found.evaluation["student"]["kl"] == pytest.approx(expected.evaluation["student"]["kl"], abs=1e-5)
    assert alone.evaluation["teacher"] is None
    assert alone.evaluation["student"]["kl"] is None
    cross_entropies = [run.evaluation["student"]["cross_entropy"] for run in (alone, found)]
    assert cross_entropies[0] == pytest.approx(cross_entropies[1], abs=1e-6)
    assert f"A student of the cache {folder}" in (alone.folder / "README.md").read_text()


def test_one_tail_cache_serves_several_k_and_beta(recipe: Recipe) -> None:
    """What is exact is the live teacher's own number; the tail's estimate is near it."""
    signal, teacher = CachedTeacher(Cache(written(recipe, top_k=10))), live(recipe)
    batch, generator = a_batch(recipe, list(range(24))), torch.Generator().manual_seed(0)
    student = tailkd.Head(torch.randn(24, 24, 8, generator=generator), torch.randn(400, 8, generator=generator))
    student = student.narrow(teacher.usable)
    for objective in (
        Objective(top_k=10, beta=2.0),
        Objective(top_k=3, beta=0.5),
        Objective(divergence="ghost_token_kl", top_k=4),
        Objective(divergence="forward_kl"),
    ):
        expected, found = (
            distillation_loss(student, one(batch), batch.labels, objective=objective).parts for one in (teacher, signal)
        )
        exact = {"clm", "head_kl", "tail_mass"} | (
            {"divergence"} if objective.divergence == "ghost_token_kl" else set()
        )
        for name in exact & set(expected):
            assert float(found[name].sum) == pytest.approx(float(expected[name].sum), rel=2e-5), name
        assert float(found["divergence"].sum) == pytest.approx(float(expected["divergence"].sum), rel=0.1)


def test_a_resumed_run_is_the_same_and_another_cache_is_another_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(recipe)
    made = reading(recipe, folder, alone=True)
    whole = tailkd.distill(made, out=str(tmp_path / "whole"))

    def interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(SplitModel, "__call__", running.on_call(24, running.send(signal.SIGTERM)))
            with pytest.raises(Preempted):
                tailkd.distill(made)

    interrupted()
    running.assert_same(tailkd.distill(made, **{"training.micro_batch_size": 4}), whole)
    shutil.rmtree(tmp_path / "run")
    interrupted()
    shutil.rmtree(folder)
    written(recipe, tail_samples=16)
    with pytest.raises(Refusal, match=r"teacher.cache \(content\): was"):
        tailkd.distill(made)


def test_rows_packed_by_documents_and_folded_ids(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    """A student with a row less than the teacher; positions start anew within a row."""
    size = len(stranger.tokenizer)
    builders.save_model(tmp_path / "wide", None, vocabulary=size + 8, hidden=48, seed=1, initializer_range=0.2)
    stranger.tokenizer.save_pretrained(tmp_path / "wide")
    recipe["teacher"] = {"model": str(tmp_path / "wide")}
    recipe["vocabulary"] = {"fold": {str(size + 2): 1}}
    recipe["data"] |= {"packing": "documents", "context": 96}
    recipe["training"] = {**recipe["training"], "tokens": 2 * 8 * 96, "save_every_tokens": None}
    recipe["evaluate"] = {"tokens": 400}
    batch = a_batch(recipe, [2, 0])
    expected = live(recipe)(batch)
    for payload in ("hidden", "dense", "tail"):
        recipe["cache"]["path"] = str(tmp_path / payload)
        found = CachedTeacher(Cache(written(recipe, payload=payload)), fold=recipe_file.read(recipe).vocabulary.fold)(
            batch
        )
        valid = batch.labels != -100
        log_p = expected.logits().log_softmax(-1)[valid]
        if isinstance(found, Cached):
            got = found.head_log_probabilities[valid]
            assert torch.allclose(got, log_p.gather(-1, found.head_ids[valid]), atol=1e-5)
        else:
            assert torch.allclose(found.logits().log_softmax(-1)[valid], log_p, atol=1e-5)
    assert tailkd.distill(reading(recipe, tmp_path / "hidden", alone=True)).finished


def test_several_teachers_are_written_down_as_one(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    recipe["teacher"] = [{"model": str(stranger.teacher), "weight": 2}, {"model": str(stranger.student)}]
    folder = written(recipe)
    found, batch = CachedTeacher(Cache(folder)), a_batch(recipe, [4])
    checked = recipe_file.read(recipe)
    mixture = parts.build(checked, silent, scored=False).teacher
    assert mixture is not None
    log_p = mixture(batch).logits().log_softmax(-1)
    cached = found(batch)
    assert isinstance(cached, Cached)
    valid = batch.labels != -100
    expected = log_p.gather(-1, cached.head_ids)[valid]
    assert torch.allclose(cached.head_log_probabilities[valid], expected, atol=1e-5)
    assert Manifest.read(folder).made_of["teacher.0.weight"] == 2
    assert tailkd.distill(reading({**recipe, "teacher": {}}, folder, alone=True)).finished
    recipe["cache"]["payload"] = "hidden"
    with pytest.raises(Refusal, match=r"cache.payload: hidden is that of one teacher, and several are given"):
        recipe_file.read(recipe)
    recipe["teacher"][0]["cache"] = str(folder)
    with pytest.raises(Refusal, match=r"teacher.0.cache: is that of a teacher alone; write the mixture down"):
        recipe_file.read(recipe)


def test_rows_that_a_selection_keeps(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    """They alone are written, and trained on."""
    recipe["data"] |= {"select": {"reference": str(stranger.student)}, "store": str(tmp_path / "store")}
    folder = written(recipe)
    rows = parts.build(recipe_file.read(reading(recipe, folder)), silent).train_rows
    assert Manifest.read(folder).total("rows") == len(rows)


@pytest.mark.slow
def test_two_ranks_learn_from_one_cache_as_one_does(recipe: Recipe, tmp_path: Path) -> None:
    made = reading(recipe, written(recipe), alone=True)
    alone = tailkd.distill(made, out=str(tmp_path / "alone"))
    process = running.start(made, ranks=2)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    losses = [[r["loss"] for r in running.records(folder)] for folder in (alone.folder, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ----- the bill


def test_the_bill_has_the_sizes_and_the_step_without_the_teacher(
    recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path
) -> None:
    live_bill = bill(recipe_file.read({**recipe, "cache": None}))
    asked = bill(recipe_file.read(recipe), usable=300)
    assert asked.cache is not None
    assert asked.cache.bytes_per_token == {"tail": 174, "dense": 1200, "hidden": 48 * 4}
    assert asked.cache.bytes == 6 * 8 * 24 * 174 + 6 * 8 * 40
    assert asked.cache.teacher_forward == pytest.approx(live_bill.pflop_per_million_tokens.teacher_forward, rel=1e-9)
    head = 2 * 48 * len(stranger.tokenizer) * 1e-9
    for payload, forward in (("tail", 0), ("hidden", head)):
        recipe["cache"]["path"] = str(tmp_path / payload)
        found = bill(recipe_file.read(reading(recipe, written(recipe, payload=payload))))
        assert found.pflop_per_million_tokens.teacher_forward == pytest.approx(forward)
        assert found.pflop_per_million_tokens.student_step == live_bill.pflop_per_million_tokens.student_step
        assert 0 < found.memory.teacher < live_bill.memory.teacher
        assert found.cache is None
    shown = CliRunner().invoke(cli.app, ["check", str(in_a_file(recipe, tmp_path)), "--json"])
    assert json.loads(shown.stdout)["cache"]["bytes_per_token"]["tail"] == 174


# ----- refusals


def test_a_cache_of_something_else(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Another teacher, K, number of draws or folded id: named with both values, for training and for writing."""
    folder = written(recipe)
    made = {**reading(recipe, folder), "cache": recipe["cache"]}
    other = builders.save_model(tmp_path / "other", stranger.tokenizer, hidden=48, seed=9)
    size = len(stranger.tokenizer)
    for change, told in (
        ({"teacher.model": str(other)}, r"teacher.weights: was '[0-9a-f]{32}', is '[0-9a-f]{32}'"),
        ({"cache.top_k": 20}, "top_k: was 10, is 20"),
        ({"cache.tail_samples": 8}, "tail_samples: was 32, is 8"),
        ({"cache.payload": "hidden"}, "payload: was 'tail', is 'hidden'"),
        ({"teacher.dtype": "bfloat16"}, "teacher.dtype: was 'float32', is 'bfloat16'"),
    ):
        with pytest.raises(Refusal, match=rf"teacher.cache: .* is the cache of something else:(.|\n)*{told}"):
            tailkd.distill(made, **change)
        with pytest.raises(Refusal, match=rf"holds the cache of something else:(.|\n)*{told}(.|\n)*another cache.path"):
            cache.write(recipe_file.read(made, change), silent)
    assert size == Manifest.read(folder).payload.usable


def test_an_objective_that_needs_more_than_there_is(recipe: Recipe, tmp_path: Path) -> None:
    made = reading(recipe, written(recipe, top_k=6), alone=True)
    with pytest.raises(
        Refusal, match=r"objective.divergence: is 'reverse_kl', which needs the probability of every id"
    ):
        tailkd.distill({**made, "objective": {"divergence": "reverse_kl"}})
    for change, told in (
        ({"objective.temperature": 2.0}, r"objective.temperature: is 2, and draws at 1 cannot be turned into others"),
        ({"objective.top_k": 7}, r"objective.top_k: is 7, and 6 ids are kept .* a larger cache.top_k"),
        ({"objective.hidden": {"project": True}}, r"objective.hidden: compares hidden states.*take payload: hidden"),
    ):
        with pytest.raises(Refusal, match=told):
            tailkd.distill(made, **change)
    shown = CliRunner().invoke(cli.app, ["check", str(in_a_file(made, tmp_path)), "objective.temperature=2"])
    assert re.search(r"teacher.cache: objective.temperature: is 2, and draws at 1", str(shown.exception))


def test_another_vocabulary(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    folder = written(recipe)
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    other = builders.build_tokenizer(texts[:30], size=390)
    made = reading(recipe, folder, alone=True)
    made["student"] = {"model": str(builders.save_model(tmp_path / "other", other))}
    with pytest.raises(Refusal, match=r"teacher.cache: .* written with another tokenizer than the student's"):
        tailkd.distill(made)
    narrow = builders.save_model(tmp_path / "narrow", stranger.tokenizer, vocabulary=len(stranger.tokenizer) - 3)
    made["student"] = {"model": str(narrow)}
    with pytest.raises(Refusal, match=r"teacher.cache: .* is over \d+ ids, and the student has \d+ of this tokenizer"):
        tailkd.distill(made)


def test_recipes_that_cannot_be(recipe: Recipe, tmp_path: Path) -> None:
    plain = {key: value for key, value in recipe.items() if key != "cache"}
    alone = {"teacher.model": None, "teacher.cache": "x"}
    for work, told in (
        (
            lambda: cache.write(recipe_file.read(plain), silent),
            "the recipe has no section cache; give it one with `path`",
        ),
        (lambda: cache.verify(recipe_file.read(plain)), "the recipe names no cache; give cache.path=FOLDER"),
        (
            lambda: cache.verify(recipe_file.read(recipe)),
            r"holds no cache of a teacher: `tailkd cache` with cache.path=",
        ),
        (
            lambda: tailkd.distill(reading(recipe, tmp_path / "none")),
            r"teacher.cache: no cache in '.*none'; `tailkd cache`",
        ),
        (
            lambda: cache.write(recipe_file.read(recipe, alone, files=False), silent),
            "teacher.model is null, and its weights are what is to be written down",
        ),
        (
            lambda: recipe_file.read(recipe, {"cache.payload": "dense", "cache.top_k": 3}),
            r"cache.top_k: has no meaning for payload 'dense'",
        ),
        (
            lambda: recipe_file.read(recipe, {"teacher.cache": "x", "objective.hidden": {"pairs": [[0, 0]]}}),
            r"objective.hidden.pairs: a cache has the last hidden states alone",
        ),
        (
            lambda: recipe_file.read(recipe, {**alone, "student": {"model": None, "from_teacher": {}}}, files=False),
            r"student.from_teacher: needs the teacher itself; give teacher.model beside teacher.cache",
        ),
        (
            lambda: recipe_file.read({**recipe, "teacher": None, "objective": {"divergence": "none"}}, files=False),
            r"cache: needs a teacher, which is null",
        ),
    ):
        with pytest.raises(Refusal, match=told):
            work()
    assert not (tmp_path / "run").exists()


def test_folders_and_disks_that_do_not_take_it(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").touch()
    with pytest.raises(Refusal, match=r"holds other files and no cache; give another cache.path"):
        written(recipe)
    (tmp_path / "cache" / "thesis.tex").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        with pytest.raises(Refusal, match=r"1\.7 MB are still to be written and the disk has 1\.0 MB free"):
            written(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "LARGEST_DENSE", 100)
        with pytest.raises(
            Refusal, match=r"dense keeps [\d,]+ bytes a token for \d+ ids; it is for vocabularies of up"
        ):
            written(recipe, payload="dense")
    with monkeypatch.context() as patch:
        patch.setattr(cache_writing._Work, "write_shard", lambda *_: None)
        with pytest.raises(
            DataError, match=r"lacks [\d,]+ rows, though every process .* a folder that all machines of"
        ):
            written(recipe)
    folder = written(recipe)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(Refusal, match=r"holds a cache of format 0, this version reads 1"):
        tailkd.distill(reading(recipe, folder))


@pytest.mark.parametrize("payload", ["tail", "dense", "hidden"])
def test_a_teacher_that_is_not_finite(recipe: Recipe, payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LiveTeacher.__call__

    def broken(teacher: LiveTeacher, batch: Batch) -> Any:
        head = plain(teacher, batch)
        head.hidden[-1, 3] = torch.inf  # type: ignore[union-attr]
        return head

    monkeypatch.setattr(LiveTeacher, "__call__", broken)
    with pytest.raises(DataError, match=r"the teacher is not finite on some training rows"):
        written(recipe, payload=payload)


# ----- faults


def damaged(recipe: Recipe, folder: Path, break_it: Callable[[Path], None], tmp_path: Path) -> tuple[str, str]:
    """What training and --verify say of a cache with one broken shard."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    break_it(sorted(copy.glob("*.safetensors"))[0])
    said = []
    for work in (
        lambda: tailkd.distill(reading(recipe, copy, alone=True), out=str(tmp_path / "broken-run")),
        lambda: cache.verify(recipe_file.read(reading(recipe, copy), files=())),
    ):
        with pytest.raises((Refusal, DataError)) as ended:
            work()
        said.append(str(ended.value))
    return said[0], said[1]


def test_a_shard_that_is_not_what_was_written(recipe: Recipe, tmp_path: Path) -> None:
    folder = written(recipe)
    name = sorted(folder.glob("*.safetensors"))[0].name

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def scratch(path: Path) -> None:
        size = path.stat().st_size
        for place in range(size // 2, size, 700):  # a bit or more of each row, of which training does not see all
            changed(path, place)

    for break_it, told in (
        (cut, r"has [\d,]+ bytes and not [\d,]+"),
        (lambda path: path.unlink(), r"is cut short, damaged or gone"),
        (lambda path: changed(path, 30), r"is cut short, damaged or gone|holds \{"),
        (scratch, r"row \d+ of it is not what was written"),
    ):
        for message in damaged(recipe, folder, break_it, tmp_path):
            assert re.search(rf"{name}.* {told}.*; delete that file .* run `tailkd cache` again", message), message


def test_every_flipped_bit_is_seen_by_verify(recipe: Recipe) -> None:
    folder = written(recipe)
    checked = recipe_file.read(reading(recipe, folder), files=())
    path = sorted(folder.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 30):
        changed(path, int(place))
        with pytest.raises(Refusal, match=path.name):
            cache.verify(checked)
        path.write_bytes(whole)
    cache.verify(checked)


def test_ids_beyond_the_vocabulary(recipe: Recipe, tmp_path: Path) -> None:
    """Whole by every checksum, and made by something that did not know the vocabulary."""
    folder = written(recipe)
    manifest = Manifest.read(folder)
    name = min(manifest.shards)
    shard = Shard(folder / name, manifest.payload)
    entries = [shard.row(place) for place in range(len(shard))]
    for entry in entries:
        entry["tail_ids"][0, 3] = 70_000
        entry |= {column: packed_ids(entry[column]) for column in ("head_ids", "tail_ids")}
    (folder / name).write_bytes(packed([key.tobytes() for key in shard.keys.numpy()], entries))
    for work in (
        lambda: tailkd.distill(reading(recipe, folder, alone=True)),
        lambda: cache.verify(recipe_file.read(recipe)),
    ):
        with pytest.raises((DataError, Refusal), match=r"row \d+ of it names id 70,000, and the vocabulary has \d+"):
            work()


@pytest.mark.parametrize("payload", ["tail", "hidden"])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    recipe: Recipe, payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at each point of the writing, one after the other in one folder; the last call goes through."""
    whole = files(written(recipe, payload=payload))
    recipe["cache"]["path"] = str(tmp_path / "again")
    points = [
        "manifest:before",
        *["head:middle"] * (payload == "hidden"),
        "shard:before@2",
        "shard:middle",
        "shard:after@2",
    ]
    for point in points:
        monkeypatch.setenv("TAILKD_FAULT", f"{point}=ENOSPC")
        monkeypatch.setattr(fault, "_passed", Counter())
        with pytest.raises(DataError, match=r"the cache cannot be written to .*No space left.*goes on from the shards"):
            written(recipe, payload=payload)
    monkeypatch.delenv("TAILKD_FAULT")
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    changed(next(path for path in shards if path.name != "head.safetensors"), 5_000)  # nor is a damaged one believed
    assert files(written(recipe, payload=payload)) == whole
    if payload == "hidden":
        (tmp_path / "again" / "head.safetensors").unlink()
        with pytest.raises(Refusal, match=r"head.safetensors is damaged or gone; .* run `tailkd cache` again"):
            cache.verify(recipe_file.read(recipe))
        assert files(written(recipe, payload=payload)) == whole


SMALL_SHARDS = "from tailkd.teacher import cache_writing; cache_writing.SHARD_BYTES = 200_000; "


@pytest.mark.slow
def test_two_processes_killed_twice_write_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(written(recipe))
    recipe["cache"]["path"] = str(tmp_path / "again")
    path = in_a_file(recipe, tmp_path)
    command = ["-c", f"{SMALL_SHARDS}from tailkd.cli import main; main()", "cache", str(path)]
    for point in ("shard:before@2=kill", "shard:middle@2=kill", ""):
        monkeypatch.setenv("TAILKD_FAULT", point)
        processes = running.start_by_hand(command)
        try:
            codes = {processes[0].wait(240)} if point else {process.wait(240) for process in processes}
        finally:
            for process in processes:
                process.kill()
        assert codes == {-signal.SIGKILL if point else 0}
    assert files(tmp_path / "again") == whole


def test_a_manifest_that_is_damaged(recipe: Recipe) -> None:
    folder = written(recipe, payload="hidden")
    whole = files(folder)
    (folder / "manifest.json").write_bytes(whole["manifest.json"][:-9])
    for work in (lambda: tailkd.distill(reading(recipe, folder)), lambda: written(recipe, payload="hidden")):
        with pytest.raises(Refusal, match=r"manifest.json is damaged .*; delete it and run `tailkd cache` again"):
            work()
    (folder / "manifest.json").unlink()
    assert files(written(recipe, payload="hidden")) == whole


def test_a_corpus_that_grew_adds_its_rows(recipe: Recipe, stranger: SimpleNamespace, tmp_path: Path) -> None:
    lines = stranger.corpus.read_text().splitlines(keepends=True)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(lines[:60]))
    recipe["data"]["train"] = {"path": str(path), "text": "body"}
    recipe["data"]["heldout"] = {"path": str(tmp_path / "held.jsonl"), "text": "body"}
    (tmp_path / "held.jsonl").write_text("".join(lines[110:]))
    folder = written(recipe)
    before = files(folder)
    path.write_text("".join(lines[:110]))
    with pytest.raises(Refusal, match=r"has no signal for [\d,]+ of [\d,]+ training rows .* `tailkd cache` with cache"):
        tailkd.distill(reading(recipe, folder))
    written(recipe)
    after = files(folder)
    assert {name: content for name, content in after.items() if name in before and name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert tailkd.distill(reading(recipe, folder)).finished
