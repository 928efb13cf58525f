"""Hidden states and vocabulary matrix against the model's own logits, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tailkd.errors import Refusal
from tailkd.models.head import SplitModel
from tailkd.objective import Head

SHARED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Mistral": {},
    "Phi": {},
    "Phi3": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Olmo2": {},
    "Granite": {"logits_scaling": 6.0},
    "Cohere": {"logit_scale": 0.3},
    "GPTNeoX": {"num_key_value_heads": None, "head_dim": None},
}


def build(family: str, *, tied: bool, **extra: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**SHARED, **FAMILIES[family], **extra}, tie_word_embeddings=tied
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # larger weights, so that soft-cap and scale matter
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_logits_exactly(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    ids = torch.randint(97, (2, 11))
    head = SplitModel(model).prove()(ids)
    assert head.hidden.shape == (2, 11, 32)
    assert torch.equal(head.logits(), model(ids).logits)
    assert (head.weight is model.get_input_embeddings().weight) == tied


def test_what_is_read() -> None:
    ids = torch.randint(97, (1, 3))
    assert SplitModel(build("Phi", tied=False))(ids).bias is not None
    assert SplitModel(build("Gemma2", tied=True))(ids).softcap == 3.0
    assert SplitModel(build("Granite", tied=True))(ids).scale == pytest.approx(1 / 6)
    assert SplitModel(build("Cohere", tied=True))(ids).scale == 0.3


def test_gradients_reach_a_tied_matrix_from_both_ends() -> None:
    model = build("Llama", tied=True)
    ids = torch.randint(97, (2, 5))
    SplitModel(model)(ids).logits().square().sum().backward()
    ours = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    torch.testing.assert_close(ours, model.get_input_embeddings().weight.grad)


def test_usable_rows_are_sliced_before_anything_else() -> None:
    model = build("Phi", tied=False)
    ids = torch.randint(90, (1, 4))
    head = SplitModel(model, usable=90).prove()(ids)
    assert head.vocabulary_size == 90
    assert torch.equal(head.logits(), model(ids).logits[..., :90]) or torch.allclose(
        head.logits(), model(ids).logits[..., :90], rtol=0, atol=1e-6
    )


def test_products_in_bfloat16_leave_bfloat16_hidden_states() -> None:
    model = build("Llama", tied=True)
    split = SplitModel(model, compute_dtype=torch.bfloat16).prove()
    head = split(torch.randint(97, (1, 4)))
    assert head.hidden.dtype == head.logits().dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32


def test_a_family_without_a_linear_head_is_refused_by_name() -> None:
    t5 = transformers.T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(Refusal, match=r"T5ForConditionalGeneration \(model type 't5'\): an encoder-decoder"):
        SplitModel(transformers.T5ForConditionalGeneration(t5))
    bert = transformers.BertConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    with pytest.raises(Refusal, match=r"BertModel \(model type 'bert'\): no single linear vocabulary projection"):
        SplitModel(transformers.BertModel(bert))


def test_a_family_that_does_more_to_its_logits_is_refused_by_name() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output.logits = output.logits * 2
            return output

    with pytest.raises(Refusal, match=r"Doubled \(model type 'llama'\): hidden states times vocabulary matrix do not"):
        SplitModel(Doubled(transformers.LlamaConfig(**SHARED))).prove()


def test_head_spells_its_docstring() -> None:
    hidden, weight, bias = torch.randn(1, 2, 4), torch.randn(7, 4), torch.randn(7)
    logits = 0.3 * (hidden @ weight.T + bias)
    torch.testing.assert_close(Head(hidden, weight, bias, 0.3, 2.0).logits(), 2.0 * torch.tanh(logits / 2.0))
