"""What is minimised: which divergence, with which settings and weights."""

from __future__ import annotations

from dataclasses import dataclass

from tailkd.objective import checks

DIVERGENCES = (
    "none",
    "forward_kl",
    "reverse_kl",
    "tail_aware",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "decoupled_kd",
    "ghost_token_kl",
)
TOP_K_DIVERGENCES = ("tail_aware", "ghost_token_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """``clm_weight * CLM + divergence_weight * divergence`` per token; `divergence` is one of `DIVERGENCES`."""

    divergence: str = "tail_aware"
    top_k: int = 10
    beta: float = 2.0
    temperature: float = 1.0
    clm_weight: float = 1.0
    divergence_weight: float = 1.0
    jsd_beta: float = 0.5
    skew: float = 0.1
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    tail_mass_floor: float = 1e-6

    def __post_init__(self) -> None:
        checks.one_of("divergence", self.divergence, DIVERGENCES)
        checks.at_least("top_k", self.top_k, 1)
        checks.positive("temperature", self.temperature)
        for name in ("beta", "clm_weight", "divergence_weight", "dkd_alpha", "dkd_beta", "tail_mass_floor"):
            checks.at_least(name, getattr(self, name), 0.0)
        for name in ("jsd_beta", "skew"):
            checks.within(name, getattr(self, name), 0.0, 1.0)

    @property
    def needs_teacher(self) -> bool:
        return self.divergence != "none"
