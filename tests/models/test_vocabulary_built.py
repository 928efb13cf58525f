"""The proof of one vocabulary with tokenizers trained on the spot, through models and a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from transformers import AutoModelForCausalLM
from vocabularies import permuted, with_specials

import tailkd
from tailkd import recipe_file
from tailkd.data.batches import evaluation_batches
from tailkd.errors import Refusal
from tailkd.models.vocabulary import usable_ids
from tailkd.parts import build

PADDING, ADDED = 64, 11  # Phi-3's rows beyond TinyLlama's, and how many of them have a token


def word_pieces(texts: list[str], size: int) -> Any:
    """Another family: pieces of words with their continuations marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(("more_of_teacher", "more_of_student"), [(0, 0), (7, 0), (0, 7), (64, 16)])
def test_itself_however_padded(stranger: SimpleNamespace, more_of_teacher: int, more_of_student: int) -> None:
    tokenizer, size = stranger.tokenizer, len(stranger.tokenizer)
    assert usable_ids(tokenizer, tokenizer, size + more_of_teacher, size + more_of_student) == size


def test_two_exchanged_tokens_are_refused(stranger: SimpleNamespace) -> None:
    tokenizer, size = stranger.tokenizer, len(stranger.tokenizer)
    other = permuted(tokenizer, 270, 301)
    names = tokenizer.convert_ids_to_tokens([270, 301])
    told = f"2 of {size} ids .*id 270: {names[0]!r} against {names[1]!r}; id 301: {names[1]!r} against {names[0]!r}"
    with pytest.raises(Refusal, match=told):
        usable_ids(tokenizer, other, size, size)


def test_another_family_is_refused(stranger: SimpleNamespace) -> None:
    size = len(stranger.tokenizer)
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    with pytest.raises(Refusal, match=r"id 0: '<s>' against '\[UNK\]'"):
        usable_ids(stranger.tokenizer, word_pieces(texts, size), size, size)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_one_special_token_more_is_refused_where_both_have_its_row(stranger: SimpleNamespace, side: str) -> None:
    size = len(stranger.tokenizer)
    both = dict.fromkeys(("teacher", "student"), stranger.tokenizer)
    both[side] = with_specials(stranger.tokenizer, "<|think|>")
    told = "'<|think|>' against None" if side == "teacher" else "None against '<|think|>'"
    told = told.replace("|", r"\|")
    with pytest.raises(Refusal, match=rf"1 of {size + PADDING} ids .*id {size}: {told}"):
        usable_ids(both["teacher"], both["student"], size + PADDING, size + PADDING)


# ----- through a recipe


@pytest.fixture
def phi(stranger: SimpleNamespace, tmp_path: Path) -> Path:
    """To the stranger's student what Phi-3 is to TinyLlama: its ids, 11 special ones more and 64 more rows."""
    specials = ["<|end of document|>", *(f"<|placeholder{number}|>" for number in range(ADDED - 2)), "<|end|>"]
    tokenizer = with_specials(stranger.tokenizer, *specials)
    rows = len(stranger.tokenizer) + PADDING
    return builders.save_model(tmp_path / "phi", tokenizer, vocabulary=rows, hidden=48, seed=4, initializer_range=0.2)


def folded(recipe: dict[str, Any], stranger: SimpleNamespace, phi: Path) -> dict[str, Any]:
    size, end = len(stranger.tokenizer), stranger.tokenizer.eos_token_id
    fold = {size: end, size + ADDED - 1: end}
    training = {**recipe["training"], "tokens": 2_000}
    return {**recipe, "teacher": {"model": str(phi)}, "vocabulary": {"fold": fold}, "training": training}


def test_a_teacher_with_more_rows_and_its_ends_folded(
    recipe: dict[str, Any], stranger: SimpleNamespace, phi: Path
) -> None:
    size, end = len(stranger.tokenizer), stranger.tokenizer.eos_token_id
    parts = build(recipe_file.read(folded(recipe, stranger, phi)), lambda message: None)
    batch = next(iter(evaluation_batches(parts.heldout_rows, tokens=200, batch_size=2)))
    assert parts.teacher is not None
    found = parts.teacher(batch).logits().softmax(-1)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(phi)(batch.input_ids).logits.double().softmax(-1)
    expected = whole[..., :size].clone()
    expected[..., end] += whole[..., size] + whole[..., size + ADDED - 1]
    expected /= expected.sum(-1, keepdim=True)
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_that_pair_trains_and_the_fold_is_in_what_it_learns(
    recipe: dict[str, Any], stranger: SimpleNamespace, phi: Path
) -> None:
    with_fold = folded(recipe, stranger, phi)
    without = {**with_fold, "out": recipe["out"] + "-without", "vocabulary": {}}
    one, other = (tailkd.distill(each).evaluation for each in (with_fold, without))
    assert one["student"]["kl"] < one["student_before"]["kl"]
    before = other["student_before"]["cross_entropy"]
    assert one["student_before"]["cross_entropy"] == pytest.approx(before, rel=1e-6)
    assert one["student_before"]["kl"] != pytest.approx(other["student_before"]["kl"], rel=1e-4)


def test_padded_rows_on_both_sides_change_nothing(
    recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path
) -> None:
    """Loud ones: their logits would take most of the probability."""
    plain = {**recipe, "training": {**recipe["training"], "tokens": 2_000}}
    padded = {**plain, "out": recipe["out"] + "-padded"}
    for role, rows in (("teacher", 64), ("student", 16)):
        folder = tmp_path / role
        model = AutoModelForCausalLM.from_pretrained(getattr(stranger, role))
        weight = model.get_input_embeddings().weight.detach()
        model.resize_token_embeddings(len(weight) + rows)
        loud = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
        model.get_input_embeddings().weight.data[len(weight) :] = 5.0 * loud
        model.save_pretrained(folder)
        stranger.tokenizer.save_pretrained(folder)
        padded[role] = {"model": str(folder)}
    one, other = (tailkd.distill(each).evaluation["student"] for each in (plain, padded))
    for name in ("cross_entropy", "kl", "head_kl", "tail_kl", "full_ece"):
        assert other[name] == pytest.approx(one[name], rel=1e-4), name
