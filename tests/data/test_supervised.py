"""Supervised runs from file to report, and the documentation's examples."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chats
import pytest
import supervised
from ruamel.yaml import YAML
from typer.testing import CliRunner

import tailkd
from tailkd import trial
from tailkd.cli import app
from tailkd.corpora import prepare
from tailkd.data import encoding, tokens, writing
from tailkd.data.corpus import Source
from tailkd.data.mixture import Mixture
from tailkd.errors import Refusal
from tailkd.pair import read_vocabulary
from tailkd.recipe_file import read

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "question", "completion": "answer"},
    "chat": {"messages": "messages"},
    "text": {"text": "answer"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return supervised.write(tmp_path_factory.mktemp("corpus") / "a.jsonl", supervised.records(80))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return supervised.models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("packing", ["rows", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_run(form: str, packing: str, made: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    """It learns, and what is measured are the learned tokens of the held-out documents."""
    recipe = supervised.recipe(made, corpus, tmp_path / "run", FORMS[form], packing=packing)
    run = tailkd.distill(recipe)
    checked = read(recipe)
    _, heldout = prepare(checked, read_vocabulary(checked), lambda line: None)
    store, learned = heldout.store, 0
    for document in heldout.documents:
        start, stop = store.offsets[document : document + 2]
        mask = heldout.learned(start, stop)
        first_is_only_read = packing == "documents" or document == heldout.documents[0]  # no begin token
        learned += int(mask[1:].sum() if first_is_only_read else mask.sum())
    before, after = (run.evaluation[role] for role in ("student_before", "student"))
    assert before["tokens"] == after["tokens"] == learned
    assert after["cross_entropy"] < before["cross_entropy"] - 0.1
    assert math.isfinite(after["kl"])
    assert (store.loss is None) == (form == "text")
    assert {"cut", "dropped"} < run.data["train"].keys()


def test_a_context_that_is_too_short(
    made: SimpleNamespace, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is cut and dropped is said and kept; where nothing is left, the run is refused."""
    recipe = supervised.recipe(made, corpus, tmp_path / "run", FORMS["chat"], packing="documents")
    recipe["data"]["context"] = 12
    recipe["training"]["tokens"] = 2 * 8 * 12
    found = json.loads(check(recipe, tmp_path))["corpus"]
    run = tailkd.distill(recipe)
    cut, dropped, documents = (
        sum(run.data[side][name] for side in ("train", "heldout")) for name in ("cut", "dropped", "documents")
    )
    assert documents == 80
    assert cut > 0
    assert dropped > 0
    told = f"{cut + dropped} of 80 examples are longer than data.context = 12: {cut} lost the left of their prompt, "
    assert found["longer_than_context"].startswith(told)
    assert "examples are longer than data.context = 12: " in capfd.readouterr().err
    recipe |= {"out": str(tmp_path / "short"), "data": {**recipe["data"], "context": 4}}
    with pytest.raises(
        Refusal, match=r"no token is left to hold out: .* without room for a whole answer are left out\)"
    ):
        tailkd.distill(recipe)


def test_the_trial_of_a_run(made: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    recipe = supervised.recipe(made, corpus, tmp_path / "run", FORMS["plain"], packing="documents")
    found = trial.load(read(recipe), lambda line: None)
    assert found["tokens_per_second"] > 0
    assert found["teacher_perplexity"]["with_begin"] > 1


def check(recipe: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return CliRunner().invoke(app, ["check", str(path), "--json"], catch_exceptions=False).stdout


def examples() -> dict[str, dict[str, str]]:
    """The blocks of the documentation's forms: heading -> language -> text."""
    forms = DOCS.read_text("utf-8").split("\n## ")[1]
    found = {}
    for section in forms.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        blocks = dict(re.findall(r"```(json|yaml|text)\n(.*?)```", body, re.DOTALL))
        if blocks:
            found[heading] = blocks
    return found


@pytest.mark.parametrize("heading", examples())
def test_the_documentation_s_examples(heading: str, made: SimpleNamespace, tmp_path: Path) -> None:
    blocks = examples()[heading]
    (tmp_path / "corpus.jsonl").write_text(blocks["json"])
    data = YAML(typ="safe").load(blocks["yaml"])["data"]
    data["train"]["path"] = str(tmp_path / data["train"]["path"])
    recipe = {**supervised.recipe(made, tmp_path, tmp_path / "run", {}), "data": data}
    recipe["training"]["tokens"] = 2_000
    rows = json.loads(check(recipe, tmp_path))["corpus"]["rows"]
    assert rows[0] == blocks["text"].removesuffix("\n")
    assert len(examples()) == 4
    assert made.tokenizer.chat_template == chats.CHATML


# ----- several sources, many processes


@pytest.mark.parametrize("packing", ["rows", "documents"])
def test_sources_of_every_form_go_together(
    packing: str, made: SimpleNamespace, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each keeps its own mask, and what is said of one corpus is said of all of them together."""
    recipe = supervised.recipe(made, corpus, tmp_path / "run", {}, packing=packing)
    for seed, name in enumerate(FORMS, start=1):
        supervised.write(tmp_path / f"{name}.jsonl", supervised.records(40, seed=seed))
    recipe["data"] |= {
        "train": [{"path": str(tmp_path / f"{name}.jsonl"), **form} for name, form in FORMS.items()],
        "context": 48,
    }
    checked = json.loads(check(recipe, tmp_path))["corpus"]["sources"]
    run = tailkd.distill(recipe)
    settled = read(run.folder / "recipe.yaml")
    rows, _ = prepare(settled, read_vocabulary(settled), lambda line: None)
    assert isinstance(rows, Mixture)
    for name, part in zip(rows.names, rows.parts, strict=True):
        assert (part.store.loss is None) == (name == "text")
        assert part.store.manifest["learned"] == checked[name]["sampled_tokens_learned"]
    found = run.data["train"]
    assert found["documents"] == sum(one["documents"] for one in run.data["sources"].values())
    for key in ("cut", "dropped"):
        assert found[key] == sum(one[key] for one in run.data["sources"].values())
    assert (found["cut"] > 0) == (packing == "documents")
    assert (f"examples are longer than data.context = 48: {found['cut']:,} lost" in capfd.readouterr().err) == (
        packing == "documents"
    )


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eighty conversations in blocks of eight, of which the template refuses ten, one at each border of a block."""
    monkeypatch.setattr(writing, "BLOCK_DOCUMENTS", 8)
    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.0)
    records = supervised.records(80)
    for place in (0, 7, 8, 20, 21, 39, 40, 55, 78, 79):
        records[place]["messages"].insert(0, {"role": "system", "content": "count"})
    records.insert(30, {"messages": None})
    return supervised.write(tmp_path / "refused.jsonl", records)


def stored(path: Path, tokenizer: Any, folder: Path, **options: Any) -> tokens.TokenStore:
    source = Source(path=str(path), messages="messages")
    usable = len(tokenizer)
    return tokens.prepare(
        source, tokenizer, folder, usable=usable, max_bad=0.5, say=lambda _: None, options=tokens.Options(**options)
    )


def content(store: tokens.TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


@pytest.mark.parametrize("processes", [1, 2])
def test_unusable_conversations_are_counted_once_however_often_it_is_interrupted(
    processes: int, refused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chats.tokenizer(chats.INSTRUCT)
    whole = stored(refused, tokenizer, tmp_path / "whole", processes=1)
    assert whole.manifest["documents"] == 70
    assert whole.manifest["skipped"] == {
        "field 'messages' is not a list of messages": 1,
        "refused by the chat template": 10,
    }
    named = [line.split(": ")[0] for line in whole.manifest["skipped_named"]]
    assert named == [f"{refused}:{line}" for line in (31, 1, 8, 9, 21)]
    assert whole.loss is not None
    assert whole.manifest["learned"] == int(whole.loss.sum())
    plain, folder = encoding.ids_of, tmp_path / "store"
    for blocks in (1, 2, 4):
        left = blocks

        def stopping(tokenizer: Any, texts: list[str]) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return plain(tokenizer, texts)

        with monkeypatch.context() as patch:
            patch.setattr(encoding, "ids_of", stopping)
            with pytest.raises(KeyboardInterrupt):
                stored(refused, tokenizer, folder, processes=1)
    (partial,) = folder.glob(".*-partial")
    progress = json.loads((partial / writing.PROGRESS).read_text())
    assert (progress["read"], progress["documents"]) == (56, 48)
    assert content(stored(refused, tokenizer, folder, processes=processes)) == content(whole)


def test_a_limit_counts_the_unusable_ones_before_it(refused: Path, tmp_path: Path) -> None:
    """The tenth document left is the thirteenth; of the three before the next one all are named."""
    tokenizer = chats.tokenizer(chats.INSTRUCT)
    whole = stored(refused, tokenizer, tmp_path)
    for processes in (1, 3):
        store = stored(refused, tokenizer, tmp_path / str(processes), limit=int(whole.offsets[10]), processes=processes)
        assert len(store) == 10
        assert store.manifest["skipped"] == {"refused by the chat template": 3}
        assert store.loss is not None
        assert whole.loss is not None
        assert store.loss.tolist() == whole.loss[: whole.offsets[10]].tolist()
