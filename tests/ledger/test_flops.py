"""The closed forms against PyTorch's own count of the products that really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tailkd.errors import Refusal
from tailkd.ledger import flops
from tailkd.ledger.anatomy import dissect
from tailkd.ledger.flops import EXECUTED, EXECUTED_EAGER, PAPER
from tailkd.ledger.published import config

ROWS, CONTEXT = 2, 24


def counted(configuration: Any, *, train: bool, frozen: bool = False, checkpointing: bool = False) -> float:
    """Operations per token that the counter sees on a model with plain attention."""
    configuration._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(configuration).train()
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model(input_ids=ids, use_cache=False).logits
        if train:
            logits.sum().backward()
    return counter.get_total_flops() / (ROWS * CONTEXT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_forward_and_step_equal_the_counter(family: str, tied: bool) -> None:
    anatomy = dissect(tiny(family, tie_word_embeddings=tied))
    assert anatomy.tied == tied
    found = counted(tiny(family, tie_word_embeddings=tied), train=False)
    assert flops.forward(anatomy, CONTEXT, EXECUTED_EAGER) == found
    found = counted(tiny(family, tie_word_embeddings=tied), train=True)
    assert flops.student_step(anatomy, CONTEXT, EXECUTED_EAGER) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_embeddings_and_checkpointing_equal_the_counter(family: str) -> None:
    options = {"tie_word_embeddings": True}
    anatomy = dissect(tiny(family, **options))
    for frozen, checkpointing in ((True, False), (False, True), (True, True)):
        found = counted(tiny(family, **options), train=True, frozen=frozen, checkpointing=checkpointing)
        asked = {"frozen_embeddings": frozen, "checkpointing": checkpointing}
        assert flops.student_step(anatomy, CONTEXT, EXECUTED_EAGER, **asked) == found


def test_generation_equals_the_counter() -> None:
    configuration = tiny("Llama")
    configuration._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(configuration).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ids = torch.ones(1, 7, dtype=torch.long)
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    whole = flops.generation(dissect(tiny("Llama")), 7, 5) * 5
    # The counter sees the prompt's whole score matrix; causally a prompt of 7 has 28 of its 49 entries.
    above = 4 * 32 * (49 - 28) * 4
    assert counter.get_total_flops() == whole + above


def test_causal_attention_is_half_and_a_window_less() -> None:
    full, windowed = (dissect(tiny("Mistral", sliding_window=w)) for w in (None, 6))
    assert flops.attention(full, 24, EXECUTED) == flops.attention(full, 24, EXECUTED_EAGER) / 2
    assert flops.attention(windowed, 24, EXECUTED) == 4 * 4 * 48 * (6 - 36 / 48)
    assert flops.attention(windowed, 4, EXECUTED) == flops.attention(full, 4, EXECUTED)


def test_the_papers_convention_is_the_written_formula() -> None:
    anatomy = dissect(config("Qwen 1.2B"))
    blocks, head = 693_633_024, 151936 * 1536
    attended = 0.5 * 4 * 2048 * 16 * 96 * 24
    assert flops.forward(anatomy, 2048, PAPER) == 2 * (blocks + head) + attended
    assert flops.student_step(anatomy, 2048, PAPER) == 6 * (blocks + head) + 3.5 * attended
    frozen = flops.student_step(anatomy, 2048, PAPER, frozen_embeddings=True, checkpointing=True)
    assert frozen == flops.student_step(anatomy, 2048, PAPER)


def test_a_cached_teacher_costs_its_vocabulary_product_or_nothing() -> None:
    anatomy = dissect(tiny("Qwen2"))
    assert flops.teacher_forward(anatomy, 24, EXECUTED, signal="hidden") == 2 * 72 * 32
    assert flops.teacher_forward(anatomy, 24, EXECUTED, signal="logits") == 0
    assert flops.sweep(anatomy, 23, 24) == 2 * 72 * 32
    assert flops.sweep(anatomy, 24, 24) == 0
    with pytest.raises(Refusal, match="got 'served'"):
        flops.teacher_forward(anatomy, 24, EXECUTED, signal="served")


def test_selection_scores_the_whole_corpus_for_the_share_that_is_kept() -> None:
    assert flops.selection(3.0, 1.0, 0.5) == 8.0
    with pytest.raises(Refusal, match="got 0"):
        flops.selection(3.0, 1.0, 0)


def test_capped_attention_is_not_fused() -> None:
    assert flops.executed(dissect(tiny("Gemma2"))) == EXECUTED_EAGER
    assert flops.executed(dissect(tiny("Llama"))) == EXECUTED


def test_what_the_closed_forms_do_not_know_is_refused() -> None:
    with pytest.raises(Refusal, match="outside the linear layers"):
        dissect(tiny("Mixtral", num_local_experts=4))
    mixed = tiny("Qwen3", layer_types=["chunked_attention"] * 4)
    with pytest.raises(Refusal, match="'chunked_attention' layers"):
        dissect(mixed)
