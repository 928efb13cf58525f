"""Tiny configurations of the families, with their peculiarities: grouped heads, a head size apart, windows."""

from __future__ import annotations

from typing import Any

FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral", "Phi", "Phi3", "Gemma2")
OWN: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 24},
    "Mistral": {"head_dim": 12, "sliding_window": None},
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "Phi3": {"num_key_value_heads": 2, "sliding_window": None},
    "Gemma2": {"head_dim": 20, "sliding_window": 4096},
}


def tiny(family: str, **other: Any) -> Any:
    """A configuration of 4 layers, 72 ids and width 32."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": 72,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return getattr(transformers, f"{family}Config")(**{**values, **OWN.get(family, {}), **other})
