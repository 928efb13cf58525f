from __future__ import annotations

from types import SimpleNamespace

import pytest

from tailkd.errors import Refusal
from tailkd.models.vocabulary import usable_ids


def tokenizer(*tokens: str) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {token: i for i, token in enumerate(tokens)})


FIVE = tokenizer("a", "b", "c", "d", "</s>")


def test_one_vocabulary() -> None:
    assert usable_ids(FIVE, FIVE, 5, 5) == 5


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(8, 5), (5, 8), (8, 16)])
def test_padded_rows_are_not_usable(teacher_rows: int, student_rows: int) -> None:
    assert usable_ids(FIVE, FIVE, teacher_rows, student_rows) == 5


def test_tokens_beyond_the_rows_are_not_usable() -> None:
    longer = tokenizer("a", "b", "c", "d", "</s>", "<pad>")
    assert usable_ids(longer, FIVE, 5, 5) == 5


def test_permuted_vocabularies_are_refused_with_the_first_ids() -> None:
    with pytest.raises(Refusal, match=r"2 of 5 ids.*id 1: 'b' against 'c'; id 2: 'c' against 'b'"):
        usable_ids(FIVE, tokenizer("a", "c", "b", "d", "</s>"), 5, 5)


def test_an_extra_token_with_a_row_is_refused() -> None:
    with pytest.raises(Refusal, match=r"id 5: '<tool>' against None"):
        usable_ids(tokenizer("a", "b", "c", "d", "</s>", "<tool>"), FIVE, 8, 8)
