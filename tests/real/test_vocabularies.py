"""The proof of one vocabulary with the tokenizers of real models."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast
from vocabularies import permuted, with_specials

from tailkd.errors import Refusal
from tailkd.models.load import check_saved_tokenizer
from tailkd.models.vocabulary import usable_ids

pytestmark = pytest.mark.real
Real = Callable[[str], Any]

IDS = {"Qwen2.5": 151_665, "Qwen3": 151_669, "Gemma-2": 256_000, "GPT-2": 50_257, "Llama": 32_000, "Mistral": 32_000}
"""Of the tokenizers."""
ROWS = {**IDS, "Qwen2.5": 151_936, "Qwen3": 151_936}
"""Of the models."""


@pytest.mark.parametrize("name", IDS)
def test_each_is_what_it_is_taken_for(real: Real, name: str) -> None:
    tokenizer = real(name)
    assert len(tokenizer) == IDS[name]
    for text in ("The capital of France is Paris.", "  two blanks, Ünï©ødé\n\tand 12345"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("more_of_teacher", "more_of_student"), [(0, 0), (64, 0), (0, 128), (64, 128)])
def test_itself_however_padded(real: Real, name: str, more_of_teacher: int, more_of_student: int) -> None:
    tokenizer, rows = real(name), ROWS[name]
    assert usable_ids(tokenizer, tokenizer, rows + more_of_teacher, rows + more_of_student) == IDS[name]


@pytest.mark.parametrize("name", IDS)
def test_two_exchanged_tokens_are_refused(real: Real, name: str) -> None:
    one, other = 5_000, 20_000
    tokenizer = real(name)
    names = tokenizer.convert_ids_to_tokens([one, other])
    told = re.escape(f"id {one}: {names[0]!r} against {names[1]!r}; id {other}: {names[1]!r} against {names[0]!r}")
    with pytest.raises(Refusal, match=rf"2 of {ROWS[name]:,} ids .*{told}"):
        usable_ids(tokenizer, permuted(tokenizer, one, other), ROWS[name], ROWS[name])


@pytest.mark.parametrize("name", IDS)
def test_one_special_token_more_is_refused(real: Real, name: str) -> None:
    tokenizer = real(name)
    rows = max(ROWS[name], IDS[name] + 64)
    told = re.escape(f"id {IDS[name]}: '<|one more|>' against None")
    with pytest.raises(Refusal, match=rf"1 of {rows:,} ids .*{told}"):
        usable_ids(with_specials(tokenizer, "<|one more|>"), tokenizer, rows, rows)


@pytest.mark.parametrize(("teacher", "student"), list(permutations(IDS, 2)))
def test_each_other_is_refused(real: Real, teacher: str, student: str) -> None:
    with pytest.raises(Refusal, match=r"do not share one vocabulary: [\d,]+ of [\d,]+ ids .*id \d+: "):
        usable_ids(real(teacher), real(student), ROWS[teacher], ROWS[student])


def test_qwen3_has_four_special_tokens_more_than_qwen2_5(real: Real) -> None:
    told = r"4 of 151,936 ids .*id 151665: '<tool_response>' against None.*id 151667: '<think>' against None"
    with pytest.raises(Refusal, match=told):
        usable_ids(real("Qwen3"), real("Qwen2.5"), ROWS["Qwen3"], ROWS["Qwen2.5"])


def test_llama_and_mistral_have_as_many_ids_and_another_vocabulary(real: Real) -> None:
    """Sizes prove nothing: 32,000 on both sides, of which a few hundred are the same token."""
    llama, mistral = real("Llama"), real("Mistral")
    assert len(llama) == len(mistral) == 32_000
    with pytest.raises(Refusal, match=r"31,730 of 32,000 ids"):
        usable_ids(llama, mistral, 32_000, 32_000)


def test_phi3_to_tinyllama(real: Real) -> None:
    """Phi-3's tokenizer is Llama's with 11 special tokens more, its model has 64 rows more."""
    llama = real("Llama")
    phi3 = with_specials(llama, "<|endoftext|>", *(f"<|placeholder{number}|>" for number in range(1, 10)), "<|end|>")
    assert usable_ids(phi3, llama, 32_064, 32_000) == 32_000


def test_llama_tokenizes_as_llama_does(real: Real) -> None:
    """Leading blanks above all, which the class LlamaTokenizer of transformers reads in another way."""
    known = {
        "grabbed": [2646, 1327, 287],
        " grabbed": [29871, 2646, 1327, 287],
        "           grabbed": [9651, 2646, 1327, 287],
        " \n": [259, 13],
        "\ttabs\t\t\t\tout here": [29871, 12, 21175, 12, 12, 12, 12, 449, 1244],
        "🦙Ꙋ": [29871, 243, 162, 169, 156, 237, 156, 141],
    }  # what SentencePiece gives, by the package's own tests
    for text, ids in known.items():
        assert real("Llama")(text, add_special_tokens=False)["input_ids"] == ids, text


def test_the_class_that_reads_llama_in_another_way_is_refused(real: Real) -> None:
    """As PreTrainedTokenizerFast its folder gives it back; under the name LlamaTokenizer it gives other ids."""
    llama, texts = real("Llama"), ["plain text", "    four blanks first", "  two"]
    check_saved_tokenizer(llama, LlamaConfig(), texts)
    named = type("LlamaTokenizer", (PreTrainedTokenizerFast,), {})
    trap = named(tokenizer_object=llama.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    check_saved_tokenizer(trap, LlamaConfig(), texts[:1])
    with pytest.raises(Refusal, match=r"becomes a LlamaTokenizer and gives other ids .*for '    four blanks first'"):
        check_saved_tokenizer(trap, LlamaConfig(), texts)
