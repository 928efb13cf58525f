"""What is learned of conversations by the chat templates of real models, and of pairs by their tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tailkd.data.chat import CHAT, PLAIN, Example, Turn, begins_with_blank
from tailkd.data.corpus import Document
from tailkd.data.tokens import Encoded, encode

pytestmark = pytest.mark.real
TURNS = (
    *(Turn("system", "Be brief."), Turn("user", "Who sang?"), Turn("assistant", "The child.\n")),
    *(Turn("user", "And who thinks?"), Turn("assistant", "think")),
)
EXPECTED = ["The child.\n<|im_end|>", "think<|im_end|>"]


def encoded(tokenizer: Any, turns: tuple[Turn, ...], template: str) -> Encoded:
    return encode(tokenizer, [Document("a", "", 0, Example(turns, template))])[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Qwen2.5", EXPECTED), ("Qwen3", [EXPECTED[0], f"<think>\n\n</think>\n\n{EXPECTED[1]}"])],
)
def test_answers_and_their_end_tokens(real: Callable[[str], Any], name: str, expected: list[str]) -> None:
    """Qwen3 shows that there was no thought, before its last answer alone."""
    tokenizer = real(name)
    found = encoded(tokenizer, TURNS, CHAT)
    assert found.loss is not None
    borders = np.flatnonzero(np.diff(found.loss)) + 1
    runs = zip(np.split(found.ids, borders), np.split(found.loss, borders), strict=True)
    assert [tokenizer.decode(ids) for ids, loss in runs if loss[0]] == expected


@pytest.mark.parametrize("name", ["Qwen2.5", "Llama", "Mistral", "Gemma-2", "GPT-2"])
def test_apart_and_together_are_the_same_ids(real: Callable[[str], Any], name: str) -> None:
    """The default template's border is one between tokens for each of them, whose blanks differ."""
    tokenizer, pair = real(name), (Turn("user", "2 + 3?"), Turn("assistant", "Five, or 5."))
    found = encoded(tokenizer, pair, PLAIN)
    together = tokenizer("Question: 2 + 3?\nAnswer: Five, or 5.", add_special_tokens=False)["input_ids"]
    assert list(found.ids) == [*together, tokenizer.eos_token_id]
    assert begins_with_blank(tokenizer) == (name in ("Llama", "Mistral"))
