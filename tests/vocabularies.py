"""Tokenizers made out of another: two tokens exchanged, one token more."""

from __future__ import annotations

import json
from typing import Any


def permuted(tokenizer: Any, one: int, other: int) -> Any:
    """The same tokens, two of which have exchanged their ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items() if number in (one, other)}
    vocabulary[names[one]], vocabulary[names[other]] = other, one
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)))


def with_specials(tokenizer: Any, *tokens: str) -> Any:
    """The same tokens and further special ones behind them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(list(tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
