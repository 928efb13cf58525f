"""One call of the chunked loss: what is asked, and what has been found so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tailkd.objective.blocks import LOW
from tailkd.objective.from_cache import CachedSide
from tailkd.objective.layout import Layout
from tailkd.objective.settings import TOP_K_DIVERGENCES, Objective
from tailkd.objective.sides import Mixture, Side
from tailkd.objective.signal import Cached

PARTS = ("loss", "clm", "divergence", "head_kl", "tail_kl", "tail_mass")


@dataclass(slots=True)
class Work:
    """Both sides at the valid positions, and what has been found there; `wide` is the dtype inside a block."""

    student: Side
    teacher: Side | Mixture | None
    labels: Tensor  # (n, 1)
    token_weights: Tensor  # (n, 1), in the wide dtype
    objective: Objective
    layout: Layout  # on the device
    log_mean: Tensor  # (groups,) log of the mean tail mass, once known
    values: dict[str, Tensor]  # (n,) per position
    gradient: bool
    cached: CachedSide | None = None  # in the place of a teacher

    @staticmethod
    def of(
        student: Side,
        teacher: Side | Mixture | None,
        labels: Tensor,
        token_weights: Tensor | None,
        objective: Objective,
        layout: Layout,
        *,
        gradient: bool,
        cached: Cached | None = None,
    ) -> Work:
        """From sides and layout with labels and token weights (batch, sequence), all on one device."""
        device = labels.device
        wide = wide_dtype(student.hidden)

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=wide, device=device)

        names = (*PARTS, "log_tail_mass")
        ones = torch.ones(layout.count, 1, dtype=wide, device=device)
        if token_weights is not None:
            ones = token_weights.detach().flatten().index_select(0, layout.valid).to(wide).unsqueeze(1)
        work = Work(
            student=student,
            teacher=teacher,
            labels=labels.flatten().index_select(0, layout.valid).unsqueeze(1),
            token_weights=ones,
            objective=objective,
            layout=layout,
            log_mean=zeros(layout.groups).fill_(float("nan")),
            values=dict(zip(names, zeros(len(names) * layout.count).view(len(names), -1), strict=True)),
            gradient=gradient,
        )
        return work if cached is None else work.with_cached(cached)

    def with_cached(self, cached: Cached) -> Work:
        """The same against a teacher that was written down: the mean tail masses are known before anything else."""
        kept = self.objective.top_k if self.has_head else 0
        self.cached = CachedSide.of(cached, self.layout.valid, kept)
        if self.has_head:
            self.note(slice(None), log_tail_mass=self.cached.log_tail_mass)
            self.close_sequences(0, self.layout.count)
        return self

    @property
    def wide(self) -> torch.dtype:
        return self.token_weights.dtype

    @property
    def vocabulary(self) -> int:
        return self.student.weight.shape[0]

    @property
    def divergence(self) -> str:
        """The divergence after its special cases: a head that holds everything splits nothing, JSD ends in KL."""
        objective = self.objective
        if objective.divergence in TOP_K_DIVERGENCES and objective.top_k >= self.vocabulary:
            return "forward_kl"
        if objective.divergence == "jensen_shannon" and objective.jsd_beta in (0.0, 1.0):
            return "forward_kl" if objective.jsd_beta == 0.0 else "reverse_kl"
        return objective.divergence

    @property
    def has_head(self) -> bool:
        """Whether the divergence splits at the teacher's top-k ids."""
        return self.divergence in TOP_K_DIVERGENCES

    def note(self, place: slice, **values: Tensor) -> None:
        """Keep values per position, (positions, 1) each."""
        for name, value in values.items():
            self.values[name][place] = value.squeeze(1)

    def close_sequences(self, start: int, stop: int) -> None:
        """log of the mean tail mass of the sequences between two positions, of which each is there whole."""
        group, log_mass = self.layout.group[start:stop], self.values["log_tail_mass"][start:stop]
        top = torch.full_like(self.log_mean, LOW).scatter_reduce_(0, group, log_mass, "amax")
        sums = torch.zeros_like(top).index_add_(0, group, (log_mass - top[group]).exp())
        counts = torch.zeros_like(top).index_add_(0, group, torch.ones_like(log_mass))
        self.log_mean = torch.where(counts > 0, top + sums.log() - counts.log(), self.log_mean)

    def tail_weight(self, start: int, stop: int) -> Tensor:
        """beta * tail mass / max(mean tail mass of the sequence, floor), (positions, 1)."""
        objective, log_mean = self.objective, self.log_mean[self.layout.group[start:stop]]
        if objective.tail_mass_floor > 0:
            log_mean = log_mean.clamp_min(math.log(objective.tail_mass_floor))
        log_mass = self.values["log_tail_mass"][start:stop]
        weight = objective.beta * (log_mass - log_mean).exp()
        return weight.masked_fill(log_mass <= LOW / 2, 0.0).unsqueeze(1)  # nothing there

    def totals(self) -> Tensor:
        """Sums of `PARTS` over positions, float64."""
        objective, values = self.objective, self.values
        if self.has_head:
            tail_kl = values["tail_kl"]
            if self.divergence == "tail_aware":
                weight = self.tail_weight(0, self.layout.count).squeeze(1)
                values["divergence"] = values["divergence"] + objective.temperature**2 * weight * tail_kl
            values["tail_mass"] = values["log_tail_mass"].exp()
            values["tail_kl"] = values["tail_mass"] * tail_kl
        elif objective.divergence in TOP_K_DIVERGENCES:  # the head holds everything
            values["head_kl"] = values["divergence"] / objective.temperature**2
        loss = objective.clm_weight * values["clm"] + objective.divergence_weight * values["divergence"]
        values["loss"] = loss * self.token_weights.squeeze(1)
        return torch.stack([values[name].sum(dtype=torch.float64) for name in PARTS])

    def floored_rows(self) -> Tensor:
        """Rows with a sequence whose mean tail mass lies below the floor."""
        below = torch.zeros_like(self.log_mean, dtype=torch.int64)
        if self.has_head:
            below = (self.log_mean.exp() < self.objective.tail_mass_floor).long()
        elif self.objective.divergence in TOP_K_DIVERGENCES and self.objective.tail_mass_floor > 0:
            below = torch.zeros_like(below).index_fill_(0, self.layout.group, 1)
        hit = torch.zeros(len(self.layout.row_borders) - 1, dtype=torch.int64, device=below.device)
        return hit.index_add_(0, self.layout.rows_of_groups, below).clamp_max(1).sum()


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype inside a block: float32, or float64 for float64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
