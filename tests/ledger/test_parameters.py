"""Parameter counts: the paper's nine models, and every family against the model that is really built."""

from __future__ import annotations

import pytest
from families import FAMILIES, tiny
from transformers import AutoModelForCausalLM

from tailkd.ledger import count
from tailkd.ledger.published import TOTALS, config


@pytest.mark.parametrize("name", TOTALS)
def test_the_papers_models_have_the_reference_totals(name: str) -> None:
    assert round(count(config(name)).total / 1e6, 3) == TOTALS[name]


def test_active_is_all_but_the_input_embedding_whether_the_head_is_tied_or_not() -> None:
    # "approximately 1B active" of Table 4's students, 1.1B of Gemma2's; 927M of the untied 1.2B with its head
    active = {name: round(count(config(name)).active / 1e6) for name in ("Qwen 1.2B", "Qwen2.5 1.2B", "Gemma2 2B")}
    assert active == {"Qwen 1.2B": 927, "Qwen2.5 1.2B": 1019, "Gemma2 2B": 1156}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_built_model(family: str, tied: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny(family, tie_word_embeddings=tied))
    model.get_input_embeddings().requires_grad_(False)
    found = count(tiny(family, tie_word_embeddings=tied), frozen_embeddings=True)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.embedding == model.get_input_embeddings().weight.numel()
    assert found.as_dict() == {
        "total": found.total,
        "embedding": found.embedding,
        "active": found.total - found.embedding,
        "trainable": found.trainable,
    }
    assert count(tiny(family, tie_word_embeddings=tied)).trainable == found.total
