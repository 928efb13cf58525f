"""How many parameters a model has, from its configuration alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, norms and biases included, a tied matrix once.

    embedding: of the input embedding (a tied head is that same matrix). active: without it, which is what the paper
    calls active: an untied head counts, a tied one does not. trainable: what the optimizer updates.
    """

    total: int
    embedding: int
    active: int
    trainable: int

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("total", "embedding", "active", "trainable")}


def count(config: Any, *, frozen_embeddings: bool = False) -> Parameters:
    """Equals ``sum(p.numel() for p in model.parameters())`` of the model with this configuration, and parts of it.

    Args:
        config: a transformers configuration of a causal language model.
        frozen_embeddings: the input embedding, and with it a tied head, is not trained.
    """
    model = on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    active = total - embedding
    return Parameters(total, embedding, active, active if frozen_embeddings else total)


def on_meta(config: Any) -> Any:
    """The causal language model of a configuration, without memory for its weights; not to be changed."""
    return _made(_ByValue(config))


@dataclass(frozen=True, eq=False)
class _ByValue:
    """A configuration that equals another of the same values."""

    config: Any

    def _values(self) -> tuple[type, str]:
        return type(self.config), self.config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


@lru_cache(maxsize=16)
def _made(wanted: _ByValue) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(wanted.config))
