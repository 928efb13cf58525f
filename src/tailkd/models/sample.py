"""Text that a model writes, for people to read."""

from __future__ import annotations

from typing import Any

import torch

TEMPERATURE = 0.7


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: list[int], *, tokens: int, usable: int) -> str:
    """What `model` writes after `prompt`, drawn from its usable tokens at `TEMPERATURE` and one seed."""
    ids = torch.tensor([prompt], device=model.device)
    blocked = list(range(usable, model.get_output_embeddings().weight.shape[0]))
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(0)
        written = _generate(model, tokenizer, ids, tokens, blocked)
    return tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, blocked: list[int]) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=blocked or None,
    )
