"""The paper's models as transformers configurations, and the figures it prints about them.

Students: Table 8, with what it leaves open or prints wrongly settled in docs/ledger.md. Teachers: their published
configurations. Nothing is loaded from a hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SIZES = {
    "Qwen1.5-1.8B": ("Qwen2", 151936, 2048, 5504, 24, 16, 16),
    "Qwen 1.2B": ("Qwen2", 151936, 1536, 4224, 24, 16, 16),
    "Qwen 0.5B": ("Qwen2", 151936, 1024, 2816, 24, 16, 16),
    "Phi-2": ("Phi", 51200, 2560, 10240, 32, 32, 32),
    "Phi-2 1.1B": ("Phi", 51200, 2560, 5120, 16, 32, 32),
    "Qwen2.5-3B": ("Qwen2", 151936, 2048, 11008, 36, 16, 2),
    "Qwen2.5 1.2B": ("Qwen2", 151936, 2048, 7680, 18, 16, 2),
    "Gemma2-9B": ("Gemma2", 256000, 3584, 14336, 42, 16, 8),
    "Gemma2 2B": ("Gemma2", 256000, 3584, 4096, 14, 16, 8),
    "TinyLlama-1.1B": ("Llama", 32000, 2048, 5632, 22, 32, 4),
    "Phi-3-mini": ("Phi3", 32064, 3072, 8192, 32, 32, 32),
    "Llama-2-7B": ("Llama", 32000, 4096, 11008, 32, 32, 32),
    "Phi-3-medium": ("Phi3", 32064, 5120, 17920, 40, 40, 10),
}
TIED = ("Qwen 0.5B", "Qwen2.5-3B", "Qwen2.5 1.2B", "Gemma2-9B", "Gemma2 2B")
HEAD_DIM = {"Gemma2-9B": 256, "Gemma2 2B": 224}

OPT_ROWS = {"OPT-125M": 50272, "Galactica-125M": 50000}
"""Vocabularies of reference models that are OPT-125M otherwise."""

# millions, norms and biases included: worked out once, apart from this code, for it to be held against
TOTALS = {
    "Qwen1.5-1.8B": 1836.829,
    "Qwen 1.2B": 1160.566,
    "Qwen 0.5B": 463.988,
    "Phi-2": 2779.684,
    "Phi-2 1.1B": 1101.430,
    "Qwen2.5-3B": 3085.939,
    "Qwen2.5 1.2B": 1330.503,
    "Gemma2-9B": 9241.706,
    "Gemma2 2B": 2073.763,
}


@dataclass(frozen=True)
class Pair:
    """A teacher and its student; PFLOP per million tokens that the paper prints for vanilla KD, TAD and MiniPLM."""

    teacher: str
    student: str
    vanilla: float
    tail_aware: float | None
    mini_plm: float
    reference: str


PAIRS = (
    Pair("Qwen1.5-1.8B", "Qwen 1.2B", 9.2, 9.3, 12.4, "Qwen-104M"),
    Pair("Qwen1.5-1.8B", "Qwen 0.5B", 6.4, 6.5, 9.7, "Qwen-104M"),
    Pair("Phi-2", "Phi-2 1.1B", 12.4, None, 18.4, "OPT-125M"),
    Pair("Qwen2.5-3B", "Qwen2.5 1.2B", 15.2, None, 22.2, "OPT-125M"),
    Pair("Gemma2-9B", "Gemma2 2B", 31.4, None, 52.0, "OPT-125M"),
)


def config(name: str) -> Any:
    """The configuration of a model of `SIZES`, or of a reference model of `PAIRS`."""
    import transformers

    if name in OPT_ROWS:
        return transformers.OPTConfig(vocab_size=OPT_ROWS[name])
    if name == "Qwen-104M":
        family, sizes, tied = "Qwen2", (151936, 512, 1408, 8, 8, 8), True
    else:
        (family, *sizes), tied = SIZES[name], name in TIED
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values: dict[str, Any] = dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
    if name in HEAD_DIM:
        values["head_dim"] = HEAD_DIM[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, f"{family}Config")(**values, **special, tie_word_embeddings=tied)
