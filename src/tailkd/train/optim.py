"""Parameter groups, optimizer, learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no norm, no bias. One pass over weights, gradients and moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over a share of the steps, then a cosine down to a share of the peak.

    Equals, for step s of S with w warm-up steps::

        peak * (s + 1) / w                                                          if s < w
        peak * (f + (1 - f) * (1 + cos(pi * (s - w) / max(S - w - 1, 1))) / 2)      otherwise, f = final_fraction
    """

    peak: float
    steps: int
    warmup_fraction: float = 0.02
    final_fraction: float = 0.1

    def __call__(self, step: int) -> float:
        warmup = math.ceil(self.warmup_fraction * self.steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        progress = min((step - warmup) / max(self.steps - warmup - 1, 1), 1.0)
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2)
