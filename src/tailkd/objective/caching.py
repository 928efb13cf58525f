"""What is kept of a teacher that is written down: its likeliest ids, and draws from the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from tailkd.objective import blocks, checks
from tailkd.objective.blockwise import BLOCK_BYTES
from tailkd.objective.rows import Lumped, Tail
from tailkd.objective.signal import Cached

SPAN = 32  # ids whose weight is summed up first in a draw


@torch.no_grad()
def written_down(logits: Tensor, *, top_k: int, uniforms: Tensor, temperature: float = 1.0) -> Cached:
    """A teacher's logits as a `Cached` signal: a pure function of the logits and of the numbers that draw.

    Equals, with ``p = (logits / temperature).softmax(-1)``, `head` its `top_k` largest and `tail` p but 0 at these::

        Cached(head, p[head].log(), tail.sum().log(), entropy(tail / tail.sum()), tail_ids, vocabulary, temperature)
        tail_ids[j] = smallest i with (tail / tail.sum()).cumsum()[i] > uniforms[j]

    Args:
        logits: (..., vocabulary), the usable ids alone; float64 is computed as such, everything else in float32.
        top_k: ids kept with their own probability; all of them from the vocabulary size on.
        uniforms: (..., draws), float64 in [0, 1): ``rand`` draws independently; ``(arange(draws) + rand) / draws``
            takes one id from each of as many equal parts, which is unbiased too and never varies more.
        temperature: divides the logits.

    Raises:
        ValueError: top_k < 1, a temperature that is not positive, shapes that do not fit.
    """
    checks.at_least("top_k", top_k, 1)
    checks.positive("temperature", temperature)
    if uniforms.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and uniforms {tuple(uniforms.shape)}; expected (..., vocabulary) and "
            "(..., draws)"
        )
    vocabulary, draws, shape = logits.shape[-1], uniforms.shape[-1], logits.shape[:-1]
    count, wide = shape.numel(), torch.promote_types(logits.dtype, torch.float32)
    logits, uniforms = logits.reshape(count, vocabulary), uniforms.reshape(count, draws)
    # Blocks that stay in a CPU's cache, their buffers made once.
    rows = max(1, min(count, BLOCK_BYTES // (4 * vocabulary) if logits.device.type == "cpu" else count))
    tail = torch.empty(rows, vocabulary, dtype=wide, device=logits.device)
    weights = torch.zeros(rows, -(-vocabulary // SPAN) * SPAN, dtype=wide, device=logits.device)
    parts = []
    for at in range(0, max(1, count), rows):
        block = logits[at : at + rows]
        buffers = tail[: len(block)].copy_(block), weights[: len(block)]
        parts.append(_kept(*buffers, min(top_k, vocabulary), uniforms[at : at + rows], temperature))
    tensors = (torch.cat(part).view(shape + part[0].shape[1:]) for part in zip(*parts, strict=True))
    return Cached(*tensors, vocabulary_size=vocabulary, temperature=temperature)


def _kept(tail: Tensor, weights: Tensor, top_k: int, uniforms: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The tensors of `Cached` for a block of logits, which is consumed; `weights` holds zeros up to whole spans."""
    wide, vocabulary = tail.dtype, tail.shape[1]
    if temperature != 1.0:
        tail.div_(temperature)
    tail.clamp_(min=blocks.LOW)
    head, ids = blocks.largest(tail, top_k)
    tail.scatter_(1, ids, blocks.LOW)
    largest = tail.amax(1, keepdim=True)
    torch.exp(tail.sub_(largest), out=weights[:, :vocabulary])
    is_empty = largest <= blocks.LOW / 2  # all other ids are padding, or there are none: any id is drawn
    total = weights.sum(1, keepdim=True).double()
    lumped = Lumped.of(head, Tail(largest, total))
    entropy = (total.log() - tail.mul_(weights[:, :vocabulary]).sum(1, keepdim=True) / total).masked_fill(is_empty, 0.0)
    log_mass = lumped.log_mass.masked_fill(is_empty, -torch.inf)
    return (
        ids,
        lumped.log[:, :-1].to(wide),
        log_mass.squeeze(1).to(wide),
        entropy.squeeze(1).to(wide),
        drawn(weights, uniforms),
    )


def drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """``(weights.cumsum(1) / weights.sum(1) > u)``'s first id for each u, (rows, draws); never one of weight 0.

    In two steps, spans of ids and then the ids of a span: one cumulative sum over a long row is slow in float64 and
    loses small weights in float32. Where all weights are 0 any id comes out.

    Args:
        weights: (rows, ids), not negative, `ids` a multiple of `SPAN`. uniforms: (rows, draws), float64 in [0, 1).
    """
    spans = weights.unflatten(1, (-1, SPAN))
    ends = spans.sum(2).double().cumsum(1)
    span, left = _found(ends, uniforms.double() * ends[:, -1:])
    inside = spans[torch.arange(len(weights), device=weights.device).unsqueeze(1), span].double().cumsum(2)
    place, _ = _found(inside, left.unsqueeze(2))
    return span * SPAN + place.squeeze(2)


def _found(ends: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose end lies beyond each target, and how far the target lies beyond the end before it."""
    last = ends[..., -1:]
    below = torch.minimum(targets, torch.nextafter(last, torch.zeros_like(last)))  # rounding must not lead out
    place = torch.searchsorted(ends, below.contiguous(), right=True).clamp_max(ends.shape[-1] - 1)
    before = torch.where(place > 0, ends.gather(-1, (place - 1).clamp_min(0)), torch.zeros_like(below))
    return place, below - before
