"""Supervised documents: which tokens are learned, and records that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
from builders import build_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tailkd.data import encoding, tokens
from tailkd.data.chat import CHAT, PLAIN, Encoded, Example, Turn, begins_with_blank, check_template
from tailkd.data.corpus import BadRecords, Document, Source
from tailkd.data.packing import Rows

GOLDEN = Path(__file__).parents[1] / "golden" / "masks.json"
ASKED = (Turn("user", "how many horses?"), Turn("assistant", "12 and a child."))
TURNS = (
    Turn("system", "be brief"),
    Turn("user", "how many horses?"),
    Turn("assistant", "12 and\n\na child.\n"),
    Turn("user", "and the sea?"),
    Turn("assistant", "never"),
)
CASES: dict[str, tuple[str | None, dict[str, str], tuple[Turn, ...], str]] = {
    "plain": (None, {}, ASKED, PLAIN),
    "plain, another template": (None, {}, ASKED, "{{{prompt}}}\n{completion} END"),
    "chat": (chats.CHATML, {}, ASKED, CHAT),
    "chat with marks": (chats.MARKED, {}, ASKED, CHAT),
    "chat with marks around the end too": (chats.MARKED_FURTHER, {}, TURNS, CHAT),
    "multi-turn": (chats.CHATML, {}, TURNS, CHAT),
    "multi-turn, another end token": (chats.CHATML, {"eos_token": "</s>"}, TURNS, CHAT),
    "multi-turn, begin token and trimmed": (chats.INSTRUCT, {"eos_token": "</s>"}, TURNS[1:], CHAT),
    "multi-turn, the last one thinks": (chats.THINKING, {}, TURNS, CHAT),
    "chat without special tokens": (chats.SPOKEN, {"eos_token": "</s>"}, TURNS, CHAT),
    "a question is left": (chats.CHATML, {}, TURNS[:4], CHAT),
}


def encoded(tokenizer: Any, turns: tuple[Turn, ...], template: str) -> Encoded:
    return encoding.encode(tokenizer, [Document("a", "", 0, Example(turns, template))])[0]


def decoded(name: str) -> str:
    """The document with what is learned in marks."""
    template, special, turns, how = CASES[name]
    tokenizer = chats.tokenizer(template, **special)
    found = encoded(tokenizer, turns, how)
    assert found.loss is not None
    changes = np.flatnonzero(np.diff(found.loss)) + 1
    runs = zip(np.split(found.ids, changes), np.split(found.loss, changes), strict=True)
    return "".join(f"⟦{tokenizer.decode(ids)}⟧" if loss[0] else tokenizer.decode(ids) for ids, loss in runs)


@pytest.mark.parametrize("name", CASES)
def test_decoded_masks(name: str) -> None:
    """Against the file; each answer and the end token after it, and nothing else."""
    shown = decoded(name)
    assert shown == json.loads(GOLDEN.read_text("utf-8"))[name]
    assert shown.endswith("⟧")
    assert len(shown.split("⟦")) - 1 == sum(turn.role == "assistant" for turn in CASES[name][2])


def test_a_pad_token_that_is_the_end_token_changes_nothing() -> None:
    plain, padded = (chats.tokenizer(chats.CHATML, **own) for own in ({}, {"pad_token": "<|im_end|>"}))
    for turns, template in ((TURNS, CHAT), (ASKED, PLAIN)):
        one, other = encoded(plain, turns, template), encoded(padded, turns, template)
        assert one == other
        rows = Rows(tokens.held([one, other]), np.arange(2), context=8, begin=None, end=plain.eos_token_id)
        labels = np.concatenate([rows[n].labels for n in range(len(rows))])
        ends = int((labels == plain.eos_token_id).sum())
        assert ends == 2 * sum(turn.role == "assistant" for turn in turns)


def test_blanks_before_an_answer_belong_to_it() -> None:
    """As a model writes them; and once where the tokenizer has its own."""
    example = Example(ASKED, PLAIN)
    assert example.pieces(begins_with_blank=False) == ["Question: how many horses?\nAnswer:", " 12 and a child."]
    assert example.pieces(begins_with_blank=True)[1] == "12 and a child."
    assert Example(ASKED, "{prompt}{completion}").pieces(begins_with_blank=False) == [t.content for t in ASKED]
    plain = build_tokenizer(["a b"])
    assert not begins_with_blank(plain)
    plain.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    assert begins_with_blank(plain)


@pytest.mark.parametrize("template", [CHAT, PLAIN, "{prompt}{completion}", "a {{x}} {prompt}\n{completion}."])
def test_templates(template: str) -> None:
    assert check_template(template) == template


NO_TEMPLATES = (
    *("", "{prompt}", "{completion} {prompt}", "{prompt} {completion", "{prompt:>9} {completion}", "chats"),
    *("{prompt} {x} {completion}", "{prompt} {completion} {completion}"),
)


@pytest.mark.parametrize("template", NO_TEMPLATES)
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(ValueError, match=r"expected 'chat' or a text with \{prompt\} and then \{completion\}, each"):
        check_template(template)


# ----- from files


def prepare(source: Source, tokenizer: Any, folder: Path, *, max_bad: float = 0.0) -> tokens.TokenStore:
    usable = len(tokenizer)
    return tokens.prepare(source, tokenizer, folder, usable=usable, max_bad=max_bad, say=lambda line: None)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def test_a_store_says_what_is_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": t, "a": f"{n} and the sea"} for n, t in enumerate(["how", "many"])])
    tokenizer = chats.tokenizer(None)
    store = prepare(Source(path=str(path), prompt="q", completion="a"), tokenizer, tmp_path / "store")
    assert store.loss is not None
    assert len(store.loss) == len(store.tokens) == store.manifest["tokens"]
    assert int(store.loss.sum()) == store.manifest["learned"]
    learned = store.tokens[store.loss.astype(bool)]
    assert tokenizer.decode(learned) == " 0 and the sea<|im_end|> 1 and the sea<|im_end|>"
    plain = prepare(Source(path=str(path), text="q"), tokenizer, tmp_path / "store")
    assert plain.loss is None
    assert plain.manifest["learned"] == plain.manifest["tokens"]


def test_fields_and_templates_are_in_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "how", "a": "12", "m": [t._asdict() for t in ASKED]}])
    tokenizer, other = chats.tokenizer(chats.CHATML), chats.tokenizer(chats.MARKED)
    pair = {"prompt": "q", "completion": "a"}
    made = [
        prepare(Source(path=str(path), **fields), how, tmp_path / "store").folder
        for fields, how in [
            ({"text": "q"}, tokenizer),
            (pair, tokenizer),
            ({"prompt": "a", "completion": "q"}, tokenizer),
            ({**pair, "template": "{prompt} {completion}"}, tokenizer),
            ({**pair, "template": CHAT}, tokenizer),
            ({**pair, "template": CHAT}, other),
            ({"messages": "m"}, tokenizer),
            ({"messages": "m"}, other),
        ]
    ]
    assert len(set(made)) == len(made)
    assert prepare(Source(path=str(path), **pair, template=PLAIN), other, tmp_path / "store").folder == made[1]


def test_hashes_are_of_the_turns(tmp_path: Path) -> None:
    records = [{"q": "a\nb", "a": "c"}, {"q": "a", "a": "b\nc"}, {"q": "a", "a": "b\nc"}]
    path = write(tmp_path / "a.jsonl", records)
    documents = list(Source(path=str(path), prompt="q", completion="a").documents(BadRecords()))
    assert documents[0].text == documents[1].text
    assert documents[0].hash != documents[1].hash == documents[2].hash


def test_parquet_and_hub_records(tmp_path: Path) -> None:
    """Messages come out of both as they do out of JSON lines."""
    import datasets

    records = [{"n": 1, "m": [t._asdict() for t in turns]} for turns in (ASKED, ASKED)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", records)
    sources = [{"path": str(tmp_path / "a.parquet")}, {"path": str(tmp_path / "b.jsonl")}, {"hub": str(tmp_path)}]
    for place in sources[:2]:
        found = list(Source(**place, messages="m").documents(BadRecords()))
        assert [document.example for document in found] == [Example(ASKED, CHAT)] * 2
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", records)
    found = list(Source(hub=str(tmp_path / "hub"), messages="m").documents(BadRecords()))
    assert [document.example for document in found] == [Example(ASKED, CHAT)] * 2
