"""F28: records of supervised corpora that cannot be used are counted by reason and named, before training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chats
import pytest
import supervised
from typer.testing import CliRunner

import tailkd
from tailkd.cli import app
from tailkd.errors import Refusal

CHAT, PAIR = {"messages": "messages"}, {"prompt": "question", "completion": "answer"}
GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "the sea"} for role in roles]}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "null": (CHAT, '{"messages": null}', "field 'messages' is not a list of messages but null"),
    "text": (CHAT, '{"messages": "hello"}', "field 'messages' is not a list of messages but str"),
    "missing": (CHAT, '{"text": "hello"}', "no field 'messages'; it has 'text'"),
    "none": (CHAT, '{"messages": []}', "no assistant message after another one; the roles are none"),
    "no answer": (CHAT, json.dumps(said("system", "user")), "no assistant message after another one; the roles are"),
    "answer first": (CHAT, json.dumps(said("assistant", "user", "assistant")), "no assistant message after another"),
    "texts": (CHAT, '{"messages": ["a"]}', "a message's role is not text but the message is str (message 1)"),
    "no role": (CHAT, '{"messages": [{"from": "a"}]}', "a message's role is not text but null (message 1)"),
    "calls": (
        CHAT,
        json.dumps({"messages": [*GOOD, {"role": "assistant", "content": None}]}),
        "a message's content is not text but null (message 3)",
    ),
    "parts": (
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        "a message's content is not text but list (message 1)",
    ),
    "blank": (CHAT, json.dumps({"messages": [*GOOD[:1], {"role": "assistant", "content": " \n"}]}), "empty text"),
    "surrogate": (CHAT, json.dumps({"messages": [{"role": "user", "content": "\ud800"}, GOOD[1]]}), "lone surrogate"),
    "NUL": (PAIR, json.dumps({"question": "a\x00", "answer": "b"}), "NUL character"),
    "blank answer": (PAIR, '{"question": "a", "answer": "  "}', "empty text"),
    "blank prompt": (PAIR, '{"question": "", "answer": "b"}', "empty text"),
    "number": (PAIR, '{"question": "a", "answer": 12}', "field 'answer' is not text but int"),
    "no prompt": (PAIR, '{"answer": "b"}', "no field 'question'; it has 'answer'"),
    "twice": (CHAT, '{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "duplicate key"),
    "cut off": (PAIR, '{"question": "a", "answ', "not JSON (the line is cut off)"),
    "refused by the template": (
        CHAT,
        json.dumps(said("system", "user", "assistant")),
        "refused by the chat template (only user and assistant may speak)",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return supervised.models(tmp_path_factory.mktemp("models"), chats.INSTRUCT)


def checked(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["check", str(path), "--json"], catch_exceptions=False)
    return json.loads(done.stdout)["corpus"]


@pytest.mark.parametrize("name", BAD)
def test_each_is_named(name: str, made: SimpleNamespace, tmp_path: Path) -> None:
    train, line, message = BAD[name]
    corpus = supervised.write(tmp_path / "a.jsonl", supervised.records(30))
    with corpus.open("a") as file:
        file.write(line)
    recipe = supervised.recipe(made, corpus, tmp_path / "run", train, max_bad=0.05)
    found = checked(recipe, tmp_path)
    assert sum(found["bad_records"].values()) == 1
    assert found["bad_records_named"][0].startswith(f"{corpus}:31: {message}")
    assert found["sampled_documents"] == 30


def test_too_many_are_refused_and_few_are_skipped(made: SimpleNamespace, tmp_path: Path) -> None:
    """Those too that only the chat template finds out; the run's record keeps their number."""
    corpus = supervised.write(
        tmp_path / "a.jsonl", [*supervised.records(57), *[said("system", "user", "assistant")] * 3]
    )
    recipe = supervised.recipe(made, corpus, tmp_path / "run", CHAT, store=str(tmp_path / "store"))
    with pytest.raises(
        Refusal, match=r"3 of 60 records are unusable \(3 x refused by the chat template\), 5.00%"
    ) as bad:
        tailkd.distill(recipe)
    assert f"{corpus}:58: refused by the chat template (only user" in str(bad.value)
    assert not (tmp_path / "store").exists()
    run = tailkd.distill(recipe, **{"data.max_bad": 0.05})
    assert run.data["skipped"] == {"refused by the chat template": 3}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (chats.BACKWARDS, "the chat template renders an answer otherwise than after its prompt (marks of"),
        (chats.MARKED.replace("== 'assistant'", "== 'model'"), "the chat template shows no answer"),
    ],
)
def test_a_template_that_hides_its_answers(template: str, reason: str, tmp_path: Path) -> None:
    made = supervised.models(tmp_path, template)
    corpus = supervised.write(tmp_path / "a.jsonl", supervised.records(9))
    recipe = supervised.recipe(made, corpus, tmp_path / "run", CHAT)
    with pytest.raises(Refusal) as refused:
        tailkd.distill(recipe)
    assert "the corpus is empty; 9 records were unusable (9 x the chat template" in str(refused.value)
    assert f"a.jsonl:1: {reason}" in str(refused.value)


def test_a_text_file_has_no_fields(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Question: a\nAnswer: b")
    recipe = supervised.recipe(made, tmp_path / "a.txt", tmp_path / "run", PAIR)
    with pytest.raises(Refusal, match=r"1 records were unusable \(1 x a text file has no fields\)"):
        tailkd.distill(recipe)
