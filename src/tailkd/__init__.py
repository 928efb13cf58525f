"""Distil causal language models without ignoring the tail of the teacher's distribution.

The way of the data: corpus -> tokens -> batches -> (teacher signal, student head) -> objective -> step -> checkpoint ->
evaluation -> report. `tailkd.run` walks it in order; each room is a folder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailkd.evaluate.calibration import full_ece as full_ece
    from tailkd.objective import Cached as Cached
    from tailkd.objective import Head as Head
    from tailkd.objective import Objective as Objective
    from tailkd.objective import decoupled_kd as decoupled_kd
    from tailkd.objective import distillation_loss as distillation_loss
    from tailkd.objective import forward_kl as forward_kl
    from tailkd.objective import ghost_token_kl as ghost_token_kl
    from tailkd.objective import jensen_shannon as jensen_shannon
    from tailkd.objective import reverse_kl as reverse_kl
    from tailkd.objective import skew_forward_kl as skew_forward_kl
    from tailkd.objective import skew_reverse_kl as skew_reverse_kl
    from tailkd.objective import tail_aware_divergence as tail_aware_divergence
    from tailkd.objective import total_variation as total_variation
    from tailkd.report.compare import relative_change as relative_change
    from tailkd.run import distill as distill

__version__ = "0.1.0"

_HOMES = {
    "Cached": "tailkd.objective",
    "Head": "tailkd.objective",
    "Objective": "tailkd.objective",
    "decoupled_kd": "tailkd.objective",
    "distill": "tailkd.run",
    "distillation_loss": "tailkd.objective",
    "forward_kl": "tailkd.objective",
    "full_ece": "tailkd.evaluate.calibration",
    "ghost_token_kl": "tailkd.objective",
    "jensen_shannon": "tailkd.objective",
    "relative_change": "tailkd.report.compare",
    "reverse_kl": "tailkd.objective",
    "skew_forward_kl": "tailkd.objective",
    "skew_reverse_kl": "tailkd.objective",
    "tail_aware_divergence": "tailkd.objective",
    "total_variation": "tailkd.objective",
}

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `tailkd --help` and the report load no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tailkd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
