"""Tiny teachers of the families that students can be cut out of, with the relations of the real ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tailkd.models.shrink import Cut

SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **WINDOWS},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True, **WINDOWS},
    "Llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 12, "sliding_window": 3},
    "Phi": {"hidden_size": 80, "num_key_value_heads": 4, "partial_rotary_factor": 0.4},
    "Phi3": {"hidden_size": 48, "sliding_window": 4},
    "Gemma2": {"hidden_size": 48, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 3},
}
FAMILIES["Gemma2"] |= {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}


def build_teacher(family: str, **extra: Any) -> Any:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**{**SHARED, **FAMILIES[family], **extra})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms too, so that no slice is taken for another
        nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: Any) -> Tensor:
    """Over more tokens than any window."""
    ids = torch.arange(2 * 11).view(2, 11) * 7 % 61
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def half(teacher: Any, **more: Any) -> Cut:
    """A cut to half the width and half the head size."""
    config = teacher.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {"hidden_size": config.hidden_size // 2, "head_dim": head_dim // 2, "embeddings": "slice", **more}
    return Cut(intermediate_size=24, **settings)
