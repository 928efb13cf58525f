"""Drawn cases of the objective: two heads, labels, settings, and what an implementation makes of them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import tailkd
from tailkd.objective.settings import DIVERGENCES


def draw(seed: int) -> tuple[dict[str, Any], tailkd.Objective, dict[str, Tensor | None]]:
    """Tensors of two heads with labels, an objective, and options; each regime of shapes and logits comes up."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    rows, length = choose.randint(1, 4), choose.randint(1, 9)
    vocabulary = choose.choice([2, 3, 11, 64, 300])

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    tensors: dict[str, Any] = {
        "hidden": normal(rows, length, 6),
        "weight": normal(vocabulary, 6),
        "bias": normal(vocabulary) if choose.random() < 0.5 else None,
        "teacher_hidden": normal(rows, length, 10),
        "teacher_weight": normal(vocabulary, 10, scale=choose.choice([0.3, 1.0, 15.0])),  # 15: a range of about 200
        "teacher_bias": None,
        "scale": choose.choice([1.0, 1.0, 0.3, 1 / 6]),
        "softcap": choose.choice([None, None, 30.0, 3.0]),
    }
    if vocabulary > 11 and choose.random() < 0.3:  # padded rows, -inf on both sides
        for name in ("bias", "teacher_bias"):
            tensors[name] = normal(vocabulary) if tensors[name] is None else tensors[name]
            tensors[name][-5:] = float("-inf")
        tensors["softcap"] = None
    usable = vocabulary - 5 * (tensors["teacher_bias"] is not None)
    labels = torch.randint(usable, (rows, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < choose.choice([0.0, 0.5, 0.75])] = -100
    objective = tailkd.Objective(
        divergence=DIVERGENCES[seed % len(DIVERGENCES)],
        top_k=choose.choice([1, 2, 7, usable - 1, usable, vocabulary, vocabulary + 3]),
        beta=choose.choice([0.5, 2.0]),
        temperature=choose.choice([1.0, 1.0, 2.0]),
        clm_weight=choose.choice([0.0, 1.0, 0.7]),
        divergence_weight=choose.choice([1.0, 2.0]),
        jsd_beta=choose.choice([0.0, 0.3, 0.5, 1.0]),
        tail_mass_floor=choose.choice([0.0, 1e-6, 0.2]),
    )
    segments = torch.randint(3, (rows, length), generator=generator).sort(1).values
    options: dict[str, Tensor | None] = {
        "labels": labels,
        "segments": segments if choose.random() < 0.4 else None,
        "token_weights": torch.rand((rows, length), generator=generator) if choose.random() < 0.3 else None,
    }
    return tensors, objective, options


def loss_and_gradients(
    case: tuple[dict[str, Any], tailkd.Objective, dict[str, Tensor | None]],
    dtype: torch.dtype,
    impl: str,
    device: str = "cpu",
) -> tuple[tailkd.objective.Loss, dict[str, Tensor]]:
    """What an implementation makes of a case on a device; value and gradients come back on the CPU."""
    tensors, objective, options = case
    cast = {name: t.detach().to(device, dtype) if isinstance(t, Tensor) else t for name, t in tensors.items()}
    options = {name: None if t is None else t.to(device) for name, t in options.items()}
    leaves = {name: cast[name].requires_grad_() for name in ("hidden", "weight", "bias") if cast[name] is not None}
    student = tailkd.Head(cast["hidden"], cast["weight"], cast["bias"], cast["scale"], cast["softcap"])
    teacher = tailkd.Head(cast["teacher_hidden"], cast["teacher_weight"], cast["teacher_bias"], 1.0, cast["softcap"])
    loss = tailkd.distillation_loss(student, teacher, objective=objective, impl=impl, **options)  # type: ignore[arg-type]
    (1.7 * loss.sum).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return loss, {name: t.detach().cpu() for name, t in {"value": loss.sum, **gradients}.items()}


def error(found: Tensor, truth: Tensor) -> float:
    finite = torch.isfinite(truth)
    assert torch.isfinite(found[finite]).all()
    return float((found[finite].double() - truth[finite]).norm() / truth[finite].norm().clamp_min(1e-12))


def small(device: str = "cpu") -> tuple[tailkd.Head, tailkd.Head, Tensor]:
    torch.manual_seed(0)
    hidden, weight, *theirs = (torch.randn(size).to(device) for size in ((2, 5, 4), (30, 4), (2, 5, 6), (30, 6)))
    student = tailkd.Head(hidden.requires_grad_(), weight.requires_grad_())
    return student, tailkd.Head(*theirs), torch.randint(30, (2, 5)).to(device)
