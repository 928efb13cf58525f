"""Drawn cases of the objective whose teacher was written down, and what an implementation makes of them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import draws
import torch
from torch import Tensor

import tailkd
from tailkd.objective import Cached, written_down
from tailkd.objective.checks import FROM_CACHE

Case = tuple[dict[str, Any], Cached, tailkd.Objective, dict[str, Tensor | None]]


def draw(seed: int) -> Case:
    """The student, labels, settings and options of `draws.draw`, the teacher cached; K up to the whole vocabulary."""
    tensors, objective, options = draws.draw(seed)
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    bias = tensors["teacher_bias"]
    teacher = tailkd.Head(
        tensors.pop("teacher_hidden"),
        tensors.pop("teacher_weight"),
        tensors.pop("teacher_bias"),
        1.0,
        tensors["softcap"],
    )
    usable = teacher.vocabulary_size - (0 if bias is None else 5)
    held = min(usable, choose.choice([1, 2, 5, 10, usable - 1, usable]) or 1)
    top_k = choose.choice([1, held, max(1, held // 2)])
    if held == teacher.vocabulary_size:
        top_k = choose.choice([top_k, held + 3])
    objective = replace(objective, divergence=FROM_CACHE[seed % 3], top_k=top_k)
    logits = teacher.logits()
    uniforms = torch.rand(*logits.shape[:2], choose.choice([1, 4, 32]), generator=generator, dtype=torch.float64)
    cached = written_down(logits, top_k=held, uniforms=uniforms, temperature=objective.temperature)
    labels = options["labels"]
    assert labels is not None
    for name, tensor in cached.tensors.items():  # where there is no label there may be anything
        tensor[labels == -100] = -7 if name.endswith("ids") else torch.nan
    return tensors, cached, objective, options


def loss_and_gradients(
    case: Case, dtype: torch.dtype, impl: str, device: str = "cpu"
) -> tuple[tailkd.objective.Loss, dict[str, Tensor]]:
    """What an implementation makes of a case on a device; value and gradients come back on the CPU."""
    tensors, cached, objective, options = case
    cast = {name: t.detach().to(device, dtype) if isinstance(t, Tensor) else t for name, t in tensors.items()}
    options = {name: None if t is None else t.to(device) for name, t in options.items()}
    leaves = {name: cast[name].requires_grad_() for name in ("hidden", "weight", "bias") if cast[name] is not None}
    student = tailkd.Head(cast["hidden"], cast["weight"], cast["bias"], cast["scale"], cast["softcap"])
    loss = tailkd.distillation_loss(student, cached.to(device), objective=objective, impl=impl, **options)  # type: ignore[arg-type]
    (1.7 * loss.sum).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return loss, {name: t.detach().cpu() for name, t in {"value": loss.sum, **gradients}.items()}
