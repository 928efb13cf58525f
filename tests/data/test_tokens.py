"""Token stores: exact content, fingerprints, and what is refused without leaving anything behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest

from tailkd.data import tokens
from tailkd.data.corpus import Source
from tailkd.errors import Refusal


def quiet(message: str) -> None:
    pass


def prepare(path: Path, tokenizer: Any, folder: Path, **settings: Any) -> tokens.TokenStore:
    values = {"usable": len(tokenizer), "max_bad": 0.1, "say": quiet, **settings}
    return tokens.prepare(Source(path=str(path), text="body"), tokenizer, folder, **values)


def test_documents_come_back_with_an_end_token(stranger: SimpleNamespace, tmp_path: Path) -> None:
    store = prepare(stranger.corpus, stranger.tokenizer, tmp_path)
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    assert len(store) == len(texts)
    assert store.tokens.dtype == np.uint16
    for number in (0, 57, len(texts) - 1):
        ids = store.tokens[store.offsets[number] : store.offsets[number + 1]].tolist()
        assert stranger.tokenizer.decode(ids) == texts[number] + "</s>"


def test_a_store_is_made_once(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(stranger.corpus, stranger.tokenizer, tmp_path)
    monkeypatch.setattr(tokens, "_write", None)
    assert prepare(stranger.corpus, stranger.tokenizer, tmp_path).folder == first.folder


def test_another_tokenizer_text_or_range_is_another_store(stranger: SimpleNamespace, tmp_path: Path) -> None:
    folders = {prepare(stranger.corpus, stranger.tokenizer, tmp_path).folder}
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    other = builders.build_tokenizer([text[::-1] for text in texts])
    assert len(other) == len(stranger.tokenizer)
    folders.add(prepare(stranger.corpus, other, tmp_path).folder)
    folders.add(prepare(stranger.corpus, stranger.tokenizer, tmp_path, usable=401).folder)
    edited = tmp_path / "edited.jsonl"
    edited.write_text(stranger.corpus.read_text().replace("river", "rivet", 1))
    folders.add(prepare(edited, stranger.tokenizer, tmp_path).folder)
    assert len(folders) == 4


def test_a_store_with_another_fingerprint_is_refused(stranger: SimpleNamespace, tmp_path: Path) -> None:
    store = prepare(stranger.corpus, stranger.tokenizer, tmp_path)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    manifest["made_of"]["tokenizer"] = "another"
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match="holds tokens of another corpus, tokenizer or setting"):
        prepare(stranger.corpus, stranger.tokenizer, tmp_path)


def refused(lines: list[str], stranger: SimpleNamespace, tmp_path: Path, **settings: Any) -> str:
    path, folder = tmp_path / "a.jsonl", tmp_path / "new" / "store"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(Refusal) as caught:
        prepare(path, stranger.tokenizer, folder, **settings)
    assert not (tmp_path / "new").exists()
    return str(caught.value)


def test_refusals_leave_nothing_behind(stranger: SimpleNamespace, tmp_path: Path) -> None:
    assert "the corpus is empty (no records)" in refused([], stranger, tmp_path)
    message = refused(['{"text": "a"}', '{"text": "b"}'], stranger, tmp_path)
    assert "the corpus is empty; 2 records were unusable (2 x no field 'body')" in message
    assert "a.jsonl:1: no field 'body'; it has 'text'" in message
    good, bad = ['{"body": "a"}'] * 8, ['{"body": 1}'] * 2
    message = refused(good + bad, stranger, tmp_path, max_bad=0.1)
    assert "2 of 10 records are unusable (2 x field 'body' is not text), 20.00% and more than data.max_bad" in message
    last = stranger.tokenizer.convert_ids_to_tokens(399)
    text = json.dumps({"body": stranger.tokenizer.decode([399])})
    message = refused([text], stranger, tmp_path, usable=399)
    assert f"token {last!r} (id 399) lies outside the 399 ids" in message


def test_tokenizers_without_an_end_token_are_refused(stranger: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = builders.build_tokenizer(["a"])
    tokenizer.eos_token = None
    with pytest.raises(Refusal, match=r"the tokenizer has no end token \(eos_token\)"):
        prepare(stranger.corpus, tokenizer, tmp_path)


def test_files_that_hold_nothing_to_use(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Mixed schemas are counted by reason; an empty file and one with nothing but blanks are refused."""
    message = refused(['{"body": "a"}', '{"text": "b"}', '{"body": ["c"]}', "[]"], stranger, tmp_path, max_bad=0.1)
    assert "3 of 4 records are unusable" in message
    for reason in ("1 x no field 'body'", "1 x field 'body' is not text", "1 x not an object"):
        assert reason in message
    blank = refused(['{"body": ""}', '{"body": " \\n"}'], stranger, tmp_path)
    assert "the corpus is empty; 2 records were unusable (2 x empty text)" in blank


def test_few_bad_records_are_skipped_and_kept_in_the_manifest(stranger: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n' * 9 + '{"body": null}\n')
    store = prepare(path, stranger.tokenizer, tmp_path / "store", max_bad=0.1)
    assert len(store) == 9
    assert store.manifest["skipped"] == {"field 'body' is not text": 1}
    assert store.manifest["skipped_named"] == [f"{path}:10: field 'body' is not text but null"]
