"""The mathematics: what a student is trained on. Imports torch and nothing else."""

from tailkd.objective.caching import written_down
from tailkd.objective.divergences import (
    decoupled_kd,
    forward_kl,
    ghost_token_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tail_aware_divergence,
    total_variation,
)
from tailkd.objective.head import Head
from tailkd.objective.loss import Loss, distillation_loss
from tailkd.objective.settings import Objective
from tailkd.objective.signal import Cached, Dense
from tailkd.objective.tally import Tally

__all__ = [
    "Cached",
    "Dense",
    "Head",
    "Loss",
    "Objective",
    "Tally",
    "decoupled_kd",
    "distillation_loss",
    "forward_kl",
    "ghost_token_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tail_aware_divergence",
    "total_variation",
    "written_down",
]
