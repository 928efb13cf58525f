"""`tailkd score` and what training makes of it: MiniPLM's rows, Rho-1's tokens, whole runs of tiny models."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import running
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tailkd
from tailkd import cli, fault, pair, parts, recipe_file, scoring, selection, trial
from tailkd import run as way
from tailkd.bill import bill, settled
from tailkd.data.batches import row_of
from tailkd.data.packing import IGNORED, Row, Rows
from tailkd.data.select import Kept, WithReference
from tailkd.errors import DataError, Preempted, Refusal
from tailkd.models import load
from tailkd.teacher import chunks, reading, score


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "CHUNK_ROWS", 40)
    monkeypatch.setattr(way, "write_page", lambda *_: None)  # its charts take longer than these runs


@pytest.fixture(scope="module")
def references(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A reference with the stranger's tokenizer, and OPT with one of its own and few positions."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("references")
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    same = builders.save_model(folder / "same", stranger.tokenizer, seed=5, initializer_range=0.2)
    other = builders.build_tokenizer(texts[:9], size=290, specials=("<s>", "</s>", "<pad>"))
    config = OPTConfig(
        vocab_size=len(other),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=30,
        init_std=0.2,
    )
    torch.manual_seed(6)
    OPTForCausalLM(config).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    return SimpleNamespace(same=same, other=folder / "other", tokenizer=other)


@pytest.fixture
def recipe(stranger: SimpleNamespace, references: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """MiniPLM with a reference of the same tokenizer; its tokens and scores in a folder of their own."""
    made = running.small(stranger, tmp_path / "run")
    made["data"] |= {"store": str(tmp_path / "store"), "select": {"reference": str(references.same)}}
    made["objective"] = {"divergence": "none"}
    return made


@pytest.fixture
def rho(recipe: dict[str, Any], references: SimpleNamespace) -> dict[str, Any]:
    del recipe["data"]["select"]
    recipe["objective"] = {"divergence": "none", "tokens": {"reference": str(references.same), "ratio": 0.6}}
    return recipe


def silent(line: str) -> None:
    """For `say`."""


def rows_of(recipe: dict[str, Any]) -> Rows:
    checked = recipe_file.read(recipe)
    return parts.prepare(checked, pair.read_vocabulary(checked), silent)[0]


def files(recipe: dict[str, Any]) -> dict[str, bytes]:
    """All that scorings have left, by the folder's and the file's name."""
    found = sorted(Path(recipe["data"]["store"]).glob("scores-*/**/*"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found if path.is_file()}


def losses_by_hand(model: Path, rows: Rows) -> np.ndarray:
    """Dense losses of all positions, 0 where there is nothing to predict."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    ids, labels = (
        torch.stack([torch.from_numpy(getattr(rows[i], n)) for i in range(len(rows))]) for n in ("input_ids", "labels")
    )
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()


# ----- MiniPLM


def test_the_verb_keeps_what_the_teacher_prefers(
    recipe: dict[str, Any], stranger: SimpleNamespace, references: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    shown = CliRunner().invoke(cli.app, ["score", str(path)])
    assert shown.exit_code == 0, shown.output
    rows = rows_of(recipe)
    assert shown.stdout == f"{len(rows)} rows scored, {len(rows) // 2} of them to train on\n"
    assert "scores: the teacher reads" in shown.stderr
    count = np.array([(rows[i].labels != IGNORED).sum() for i in range(len(rows))])
    teacher, reference = (losses_by_hand(m, rows).sum(1) / count for m in (stranger.teacher, references.same))
    expected = np.sort(np.argsort(-(reference - teacher), kind="stable")[: len(rows) // 2])
    built = parts.build(recipe_file.read(recipe), silent).train_rows
    assert isinstance(built, Kept)
    assert np.array_equal(built.kept, expected)
    tables = [np.frombuffer(content, score.PER_ROW) for name, content in files(recipe).items() if "bin" in name]
    found = sorted((table["nll"] / table["weight"]).tolist() for table in tables)
    np.testing.assert_allclose(found, sorted([teacher.tolist(), reference.tolist()]), rtol=1e-5)
    assert not list(Path(recipe["data"]["store"]).glob("scores-*/chunks"))


def test_a_run_scores_first_and_trains_on_exactly_the_kept_rows(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe["data"]["context"], recipe["training"]["tokens"] = 96, 12 * 8 * 96
    read: list[int] = []
    plain = Kept.__getitem__
    monkeypatch.setattr(Kept, "__getitem__", lambda rows, row: read.append(int(rows.kept[row])) or plain(rows, row))
    run = tailkd.distill(recipe)
    assert capfd.readouterr().err.count("rows, once; what it finds is kept in ") == 2
    built = parts.build(recipe_file.read(recipe), silent)
    kept = built.train_rows
    assert isinstance(kept, Kept)
    assert read == [int(kept.kept[row_of(sample, len(kept), 3)]) for sample in range(12 * 8)]
    assert set(read) == set(kept.kept.tolist())
    assert run.data["train"]["tokens"] == kept.tokens
    assert run.recipe["data"]["select"] == {
        "method": "difference",
        "ratio": 0.5,
        "reference": recipe["data"]["select"]["reference"],
    }
    before = files(recipe)
    again = tailkd.distill({**recipe, "out": recipe["out"] + "2"})  # the scores are there
    assert "scores:" not in capfd.readouterr().err
    assert files(recipe) == before
    running.assert_same(run, again)
    aware = {**recipe, "objective": {"divergence": "tail_aware", "top_k": 5}}
    assert parts.build(recipe_file.read(aware), silent).train_rows.choice == kept.choice  # TAD is one more line


def test_another_selection_is_another_run(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(selection.SplitModel, "__call__", running.on_call(220, lambda: stop()))
        with pytest.raises(KeyboardInterrupt):
            tailkd.distill(recipe)
    with pytest.raises(Refusal, match=r"data.select.ratio: was 0.5, is 0.7"):
        tailkd.distill(recipe, **{"data.select.ratio": 0.7})
    with pytest.raises(Refusal, match=r"data.select.method: was 'difference', is None"):
        tailkd.distill({**recipe, "data": {**recipe["data"], "select": None}})
    built = parts.build(recipe_file.read(recipe), silent)
    others = replace(built, train_rows=Kept(built.train_rows, np.arange(len(built.train_rows) - 1)))
    assert built.fingerprint != others.fingerprint  # other scores chose other rows


def test_what_weights_are_scored_by(
    references: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(references.same, tmp_path / "copy")
    first = load.fingerprint("teacher", str(references.same))
    assert load.fingerprint("teacher", str(tmp_path / "copy")) == first
    weights = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(weights)
    assert load.fingerprint("teacher", str(tmp_path / "copy")) != first
    monkeypatch.setattr(load, "load_config", lambda *_, **__: SimpleNamespace(_commit_hash="c0ffee"))
    assert load.fingerprint("teacher", "some/model", revision="main") == "some/model@c0ffee"


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("per", ["token", "byte"])
def test_a_scoring_that_is_broken_twice_ends_with_the_same_files(
    recipe: dict[str, Any], references: SimpleNamespace, per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if per == "byte":
        recipe["data"]["select"]["reference"] = str(references.other)
    whole = {**recipe, "data": {**recipe["data"], "store": str(tmp_path / "whole")}}
    scoring.score(recipe_file.read(whole), silent)
    checked = recipe_file.read(recipe)
    for point in ("chunk:before@2", "chunk:middle@4", "scores:middle@2", "manifest:before", "chunk:after@2"):
        monkeypatch.setenv("TAILKD_FAULT", f"{point}=ENOSPC")
        fault._passed.clear()
        with pytest.raises(DataError, match=r"scores cannot be written to .*No space left.*it goes on from the chunks"):
            scoring.score(checked, silent)
        assert not [name for name in files(recipe) if ".tmp-" in name]
    assert {name.partition("/")[0] for name in files(recipe)} != {}
    monkeypatch.delenv("TAILKD_FAULT")
    chunk = sorted(Path(recipe["data"]["store"]).glob("scores-*/chunks/*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-30] + b"?" * 30)  # is not what was written, so it is read again
    (chunk.parent / ".tmp-000001-killed").write_bytes(b"half")
    lines: list[str] = []
    found = scoring.score(checked, lines.append)
    assert files(recipe) == files(whole)
    assert found.kept == found.rows // 2
    assert any(re.match(r"scores: \d+ of \d+ chunks", line) for line in lines)


def test_a_signal_stops_a_scoring_between_chunks(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    with monkeypatch.context() as patch:
        patch.setattr(score, "_write_chunk", lambda *_: running.send(signal.SIGTERM)())
        with pytest.raises(Preempted, match=r"SIGTERM came; the same command goes on"):
            scoring.score(recipe_file.read(recipe), silent)
    assert scoring.score(recipe_file.read(recipe), silent).kept


def test_two_scorings_of_other_rows_are_refused(recipe: dict[str, Any]) -> None:
    checked = recipe_file.read(recipe)
    scoring.score(checked, silent)
    folders = sorted(Path(recipe["data"]["store"]).glob("scores-*"))
    table = np.fromfile(folders[0] / "scores.bin", score.PER_ROW)
    table["weight"][3] += 1
    manifest = json.loads((folders[0] / "manifest.json").read_text())

    def tampered(content: bytes, **changes: Any) -> None:
        (folders[0] / "scores.bin").write_bytes(content)
        digest = score.xxhash.xxh3_128_hexdigest(content)
        (folders[0] / "manifest.json").write_text(json.dumps({**manifest, "xxh3_128": digest, **changes}))

    tampered(table.tobytes())
    with pytest.raises(Refusal, match=r"were not made of the same rows; delete both folders to score anew"):
        scoring.score(checked, silent)
    tampered(table.tobytes(), instances="0")
    with pytest.raises(Refusal, match=r"holds scores of other rows than these; delete the folder"):
        scoring.score(checked, silent)
    tampered(table.tobytes(), xxh3_128="0")
    with pytest.raises(Refusal, match=r"scores.bin is damaged; delete the folder"):
        scoring.score(checked, silent)


def test_processes_that_share_no_disk(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_write_chunk", lambda *_: None)
    with pytest.raises(DataError, match=r"is not there, though every process .* a folder that all machines of the run"):
        scoring.score(recipe_file.read(recipe), silent)


def test_the_second_of_two_waits(tmp_path: Path) -> None:
    import threading

    said: list[str] = []

    def second() -> None:
        with chunks.alone(tmp_path / "scores", "scores", said.append):
            said.append("in")

    with chunks.alone(tmp_path / "scores", "scores", said.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            pass
        assert said[0].endswith("waiting for it")
    thread.join(10)
    assert said[1:] == ["in"]


def test_what_has_nothing_to_score(recipe: dict[str, Any]) -> None:
    del recipe["data"]["select"]
    with pytest.raises(Refusal, match=r"neither data.select nor objective.tokens, so nothing is to be scored"):
        scoring.score(recipe_file.read(recipe), silent)


def test_rules(recipe: dict[str, Any], references: SimpleNamespace) -> None:
    with pytest.raises(Refusal, match=r"data.select: needs a teacher, which is null"):
        recipe_file.read({**recipe, "teacher": None})
    both = {**recipe, "objective": {"divergence": "none", "tokens": {"reference": str(references.same)}}}
    with pytest.raises(Refusal, match=r"objective.tokens: does not go together with data.select"):
        recipe_file.read(both)
    for key, value in (("ratio", 0), ("ratio", 1.5), ("method", "best"), ("reference", "./nowhere")):
        with pytest.raises(Refusal, match=rf"data.select.{key}: "):
            recipe_file.read(recipe, {f"data.select.{key}": value})
        with pytest.raises(Refusal, match=rf"objective.tokens.{key}: "):
            recipe_file.read({**both, "data": {**recipe["data"], "select": None}}, {f"objective.tokens.{key}": value})


def test_the_bill(recipe: dict[str, Any], rho: dict[str, Any], references: SimpleNamespace) -> None:
    plain = bill(settled(recipe_file.read({**rho, "objective": {"divergence": "forward_kl"}})))
    teacher = plain.pflop_per_million_tokens.teacher_forward
    miniplm = {**rho, "data": {**rho["data"], "select": {"reference": str(references.same), "ratio": 0.25}}}
    miniplm["objective"] = {"divergence": "none"}
    rho_1 = bill(settled(recipe_file.read(rho))).pflop_per_million_tokens
    found = bill(settled(recipe_file.read(miniplm))).pflop_per_million_tokens
    assert rho_1.selection > 0 == rho_1.teacher_forward
    assert found.selection == pytest.approx((teacher + rho_1.selection) / 0.25)
    assert found.total == pytest.approx(found.student_step + found.selection)


@pytest.mark.slow
def test_kills_and_ranks_change_no_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two processes that are killed twice, one after the other, against one that nothing happens to."""
    whole = {**recipe, "data": {**recipe["data"], "store": str(tmp_path / "whole")}}
    for made, ranks, faults in ((whole, 1, [""]), (recipe, 2, ["chunk:before@2=kill", "scores:before=kill", ""])):
        for number, what in enumerate(faults, 1):
            process = running.start(made, ranks=ranks, environment={"TAILKD_FAULT": what}, verb="score")
            output = process.communicate(timeout=240)
            assert (process.returncode == 0) == (number == len(faults)), output
            assert "rows scored" in output[0] or number < len(faults), output
    assert files(recipe) == files(whole)


# ----- another tokenizer: per byte of the same text


def row(ids: list[int], rest: int = 3) -> Row:
    labels = np.array(ids + [IGNORED] * rest)
    return Row(np.zeros_like(labels), labels, np.zeros_like(labels))


def test_text_of_a_row(stranger: SimpleNamespace) -> None:
    tokenizer = stranger.tokenizer
    end = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    euro = ids("€")
    assert len(euro) == 3
    whole = reading.text_of(row([*ids("the river"), end, *ids("stone €")]), tokenizer)
    assert whole.pieces == [("the river", True), ("stone €", False)]
    assert whole.bytes == 9 + 9
    assert whole.counted.sum() == len(ids("the river") + ids("stone €"))
    cut = reading.text_of(row([*euro[1:], *ids("lamp"), end, end, *ids("sea "), *euro[:2]]), tokenizer)
    assert cut.pieces == [("lamp", True), ("", True), ("sea ", False)]
    assert cut.counted.sum() == len(ids("lamp") + ids("sea "))
    assert not cut.counted[:2].any()
    assert reading.text_of(row([end]), tokenizer).pieces == [("", True)]
    assert reading.text_of(row([]), tokenizer).bytes == 0


def test_a_reference_with_another_tokenizer(
    recipe: dict[str, Any], stranger: SimpleNamespace, references: SimpleNamespace
) -> None:
    """Row by row by hand: the same text, both sums over its UTF-8 bytes; OPT in windows of its 30 positions."""
    recipe["data"]["select"]["reference"] = str(references.other)
    recipe["data"]["context"] = 48
    built = parts.build(recipe_file.read(recipe), silent).train_rows
    assert isinstance(built, Kept)
    rows, theirs = built.rows, references.tokenizer
    teacher = losses_by_hand(stranger.teacher, rows)
    opt = AutoModelForCausalLM.from_pretrained(references.other)
    differences = []
    for number in range(len(rows)):
        labels = rows[number].labels
        text = (labels != IGNORED) & (labels != stranger.tokenizer.eos_token_id)
        pieces = stranger.tokenizer.decode(labels[labels != IGNORED]).split("</s>")
        ids = [i for piece in pieces for i in (*theirs(piece, add_special_tokens=False)["input_ids"], -1)][:-1]
        total, count = 0.0, -(-len(ids) // 30)
        assert count > 1 or number == len(rows) - 1
        for window in np.array_split(np.array(ids), count):
            read = torch.tensor([theirs.bos_token_id, *np.where(window < 0, theirs.eos_token_id, window)])
            with torch.no_grad():
                log_p = opt(input_ids=read[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
            nll = -log_p.gather(1, read[1:].unsqueeze(1)).squeeze(1).numpy()
            total += float(nll[window >= 0].sum())
        size = len("".join(pieces).encode())
        differences.append(total / size - teacher[number][text].sum() / size)
    expected = np.sort(np.argsort(-np.array(differences), kind="stable")[: len(rows) // 2])
    assert np.array_equal(built.kept, expected)


def test_what_begins_and_ends_a_reference(references: SimpleNamespace) -> None:
    def of(bos: int | None, eos: int | None) -> SimpleNamespace:
        return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)

    assert reading.marks(of(5, 6), of(0, 2)) == (5, 6)
    assert reading.marks(of(None, 6), of(0, 2)) == (6, 6)
    assert reading.marks(of(None, None), of(0, 2)) == (0, 2)  # Galactica
    assert reading.marks(of(None, None), of(None, None)) == (None, None)


def test_a_reference_that_cannot_read_the_text(
    recipe: dict[str, Any], references: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(references.other, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    recipe["data"]["select"]["reference"] = str(tmp_path / "bare")
    with pytest.raises(
        Refusal, match=r"has another vocabulary than the teacher and no tokenizer with a begin or end tok"
    ):
        scoring.score(recipe_file.read(recipe), silent)


# ----- Rho-1


def test_rho_1_reads_the_reference_once(
    rho: dict[str, Any], references: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tailkd.distill(rho)
    assert capfd.readouterr().err.count("scores: the reference reads") == 1
    built = parts.build(recipe_file.read(rho), silent).train_rows
    assert isinstance(built, WithReference)
    rows = built.rows
    np.testing.assert_allclose(built.losses, losses_by_hand(references.same, rows), atol=2e-5)
    assert scoring.score(recipe_file.read(rho), silent) == scoring.Scored(len(rows), None)
    other = tailkd.distill({**rho, "out": rho["out"] + "2"}, **{"training.micro_batch_size": 2})
    ours, theirs = ([step["loss"] for step in one.metrics if step["kind"] == "step"] for one in (run, other))
    assert ours == pytest.approx(theirs, rel=1e-5)
    plain = tailkd.distill({**rho, "out": rho["out"] + "3", "objective": {"divergence": "none"}})
    first = [next(step for step in one.metrics if step["kind"] == "step") for one in (run, plain)]
    assert first[0]["loss"] != first[1]["loss"]
    assert first[0]["clm"] == pytest.approx(first[1]["clm"])  # of all positions
    assert first[0]["tokens"] == first[1]["tokens"]


def test_rho_1_needs_the_students_tokens(rho: dict[str, Any], references: SimpleNamespace) -> None:
    rho["objective"]["tokens"]["reference"] = str(references.other)
    with pytest.raises(
        Refusal, match=r"objective.tokens.reference: .* has another vocabulary than the student; losses"
    ):
        tailkd.distill(rho)


def test_a_trial_scores_nothing(rho: dict[str, Any]) -> None:
    assert trial.load(recipe_file.read(rho), silent)["tokens_per_second"] > 0
    assert not files(rho)


def test_evaluating_a_run_scores_nothing(recipe: dict[str, Any]) -> None:
    run = tailkd.distill(recipe)
    for path in Path(recipe["data"]["store"]).glob("scores-*"):
        shutil.rmtree(path)
    before = run.evaluation["student"]["cross_entropy"]
    assert way.evaluate(run, silent).evaluation["student"]["cross_entropy"] == pytest.approx(before)
    assert not files(recipe)


# ----- docs/selection.md


def test_the_examples_of_the_documentation(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Its YAML is read as a part of a recipe, and its commands are those of the tool."""
    text = (Path(__file__).parents[1] / "docs" / "selection.md").read_text()
    found = [recipe_file.yaml().load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert [list(one) for one in found] == [["data"], ["objective"]]
    for part in found:
        made = running.small(stranger, tmp_path / "run")
        for section, values in part.items():
            made[section] = {**(made[section] if section == "data" else {}), **values}
        checked = recipe_file.read(made)
        assert (checked.data.select or checked.objective.tokens) is not None
    for command in re.findall(r"tailkd (\w+) recipe.yaml", text):
        assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0
    for name in (score.SCORES, score.MANIFEST, f"{score.CHUNKS}/", "256 rows a file"):
        assert name in text


# ----- real text, a really pretrained teacher


DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
TEACHER, TEXT = DATA / "models" / "stories260k", DATA / "instruct" / "gsm8k_train.jsonl.gz"
BASE = """
name: base
teacher: {{model: {teacher}}}
student: {{from_teacher: {{layers: 2}}}}
data: {{train: {{path: {corpus}, text: question}}, context: 64, store: {store}}}
objective: {{divergence: none}}
training: {{flops: 1.0e+11, batch_size: 8, learning_rate: 1.0e-3}}
evaluate: {{tokens: 2000}}
"""
SELECT = "data: {{select: {{ratio: 0.5, reference: {reference}}}}}"
RIVALS = {
    "clm": "",
    "miniplm": SELECT,
    "tad-on-miniplm": SELECT + "\nobjective: {{divergence: tail_aware}}",
    "rho-1": "objective: {{tokens: {{ratio: 0.6, reference: {teacher}}}}}",
}


@pytest.mark.slow
@pytest.mark.skipif(not (TEACHER.is_dir() and TEXT.is_file()), reason="TAILKD_DATA names no data folder")
def test_real_text_at_equal_operations(references: SimpleNamespace, tmp_path: Path) -> None:
    """Four recipes of at most four lines beside their base, and one report of all."""
    corpus = tmp_path / "questions.jsonl"
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        corpus.write_text("".join(line for line, _ in zip(lines, range(600), strict=False)))
    names = {"teacher": TEACHER, "corpus": corpus, "store": tmp_path / "store", "reference": references.other}
    (tmp_path / "base.yaml").write_text(BASE.format(**names))
    costs = {}
    for name, lines in RIVALS.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"extends: base.yaml\nname: {name}\n{lines}\n".format(**names))
        assert len(file.read_text().split("\n")) <= 5
        run = tailkd.distill(file, out=str(tmp_path / name))
        assert run.evaluation["student"]["cross_entropy"] < run.evaluation["student_before"]["cross_entropy"] - 0.2
        found = settled(recipe_file.read(file))
        costs[name] = found.tokens * bill(found).pflop_per_million_tokens.total * 1e9
    assert list(costs.values()) == pytest.approx([1e11] * 4, rel=0.05)
    shown = CliRunner().invoke(cli.app, ["report", *(str(tmp_path / name) for name in RIVALS)])
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.stdout for name in RIVALS)


@pytest.mark.parametrize("change", [{"packing": "documents"}, {"train": {"prompt": "body", "completion": "body"}}])
def test_only_rows_of_plain_text_are_chosen_from(change: dict[str, Any], stranger: Any, tmp_path: Path) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    recipe["data"]["select"] = {"method": "difference", "ratio": 0.5, "reference": str(stranger.student)}
    recipe["data"]["train"] |= change.get("train", {})
    recipe["data"] |= {key: value for key, value in change.items() if key != "train"}
    with pytest.raises(Refusal, match=r"data.select: chooses among rows of plain text"):
        recipe_file.read(recipe)
