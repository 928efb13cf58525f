"""F27: no chat template, another one than the teacher's, pad == eos: a stated rule, and the end token is learned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chats
import pytest
import supervised
from transformers import AutoTokenizer, ByT5Tokenizer
from typer.testing import CliRunner

import tailkd
from tailkd.cli import app
from tailkd.data.chat import chat_template
from tailkd.errors import Refusal

CHAT = {"messages": "messages"}
PAIR = {"prompt": "question", "completion": "answer"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return supervised.write(tmp_path_factory.mktemp("corpus") / "a.jsonl", supervised.records(60))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return supervised.models(tmp_path_factory.mktemp("models"))


def rows(recipe: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["check", str(path), "--json"], catch_exceptions=False)
    return json.loads(done.stdout)["corpus"]["rows"]


@pytest.mark.parametrize("train", [CHAT, {**PAIR, "template": "chat"}])
def test_no_chat_template(train: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Refused by name before anything is written, by `check` and by `distill`; a plain template needs none."""
    made = supervised.models(tmp_path, None)
    recipe = supervised.recipe(made, corpus, tmp_path / "run", train, store=str(tmp_path / "store"))
    message = r"the tokenizer '.*student' \(.*\) has no chat template, .*; put a chat_template.jinja into its folder"
    with pytest.raises(Refusal, match=message):
        rows(recipe, tmp_path)
    with pytest.raises(Refusal, match=message) as refused:
        tailkd.distill(recipe)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "store").exists()
    recipe["data"]["train"] = {"path": str(corpus), **PAIR}
    assert rows(recipe, tmp_path)[0].startswith("Question: 0 has")


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand() -> None:
    slow: Any = ByT5Tokenizer()
    slow.chat_template = chats.CHATML
    with pytest.raises(Refusal, match=r"\(ByT5Tokenizer\) cannot say where its tokens stand in a text"):
        chat_template(slow)


def test_the_student_s_template_is_the_one(made: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    """Whatever the teacher's folder says: both models read the same ids; and `check` shows what is learned."""
    teacher = AutoTokenizer.from_pretrained(made.teacher)
    teacher.chat_template = chats.INSTRUCT
    teacher.save_pretrained(made.teacher)
    first = rows(supervised.recipe(made, corpus, tmp_path / "run", CHAT, packing="documents"), tmp_path)[0]
    documents = first.split(" ⏐ ")
    assert len(documents) > 1
    for shown in documents:
        assert shown.startswith("<|im_start|>user\n")
        assert shown.endswith("<|im_end|>⟧")
        assert shown.count("⟦") == shown.count("<|im_start|>assistant\n⟦") == shown.count("<|im_end|>⟧")
        assert shown.count("<|im_end|>") == 2 * shown.count("⟦")


def test_pad_is_the_end_token(made: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    recipe = supervised.recipe(made, corpus, tmp_path / "run", CHAT, packing="documents")
    before = rows(recipe, tmp_path)
    student = AutoTokenizer.from_pretrained(made.student)
    assert student.pad_token is None
    student.pad_token = student.eos_token
    student.save_pretrained(made.student)
    assert rows(recipe, tmp_path) == before
