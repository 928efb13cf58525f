"""How much the divergence weighs against cross-entropy: two recipes may differ in that as well as in its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.report.groups import Group, grouped
from tailkd.report.record import Run

SAME = 1.05  # weights within this factor are one


@dataclass(frozen=True)
class Weight:
    """Of a method's divergence, per unit of cross-entropy: head + mean of the tail; None where no number is known."""

    name: str
    divergence: str
    total: float | None


def weights(methods: Sequence[Group], mass: float) -> list[Weight]:
    """Of the methods with a divergence and cross-entropy. The head's KL weighs 1 in all of them.

    The tail's KL weighs beta in TAD, in the mean over tokens (Eq. 3), its own mass in KL, whose mean is `mass`, and
    nothing in the ghost-token KL. The other divergences have units of their own.
    """
    found = []
    for method in methods:
        objective = method.runs[0].recipe["objective"]
        if objective["divergence"] == "none" or not objective.get("clm_weight", 1.0):
            continue
        tail = {"tail_aware": objective.get("beta", 2.0), "forward_kl": mass, "ghost_token_kl": 0.0}
        scale = objective.get("divergence_weight", 1.0) / objective.get("clm_weight", 1.0)
        mean_tail = tail.get(objective["divergence"])
        total = None if mean_tail is None else scale * (1 + mean_tail)
        found.append(Weight(method.name, objective["divergence"], total))
    return found


def warning(runs: Sequence[Run]) -> str | None:
    """What to know before a difference is put down to the shape of the divergence; None where the weights are one."""
    teacher = next((run.evaluation["teacher"] for run in runs if run.evaluation["teacher"] is not None), None)
    if teacher is None:
        return None
    size, mass = _tail_mass(runs, teacher)
    found = weights(grouped(runs), mass)
    known = {one.name: one.total for one in found if one.total is not None}
    if len(known) < 2 or max(known.values()) <= SAME * min(known.values()):
        return None
    numbers = ", ".join(f"{name} {total:.3g}" for name, total in known.items())
    others = [one.name for one in found if one.total is None]
    return (
        f"The divergence has another total weight against cross-entropy (head + mean of the tail): {numbers}. The tail "
        f"weighs beta in TAD, and in KL the teacher's mean tail mass, {mass:.3g} at K = {size}. A difference between "
        "them is one of weight as well as of shape"
        + (f"; of {', '.join(others)} no such number is known." if others else ".")
    )


def _tail_mass(runs: Sequence[Run], teacher: dict[str, Any]) -> tuple[int, float]:
    """The measured K next to the one at which TAD splits, and the teacher's mean mass outside its first K ids."""
    tad = [run for run in runs if run.recipe["objective"]["divergence"] == "tail_aware"]
    wanted = tad[0].recipe["objective"].get("top_k", 10) if tad else runs[0].recipe["evaluate"]["top_k"]
    size = min(teacher["tail_mass"], key=lambda k: abs(math.log(int(k) / wanted)))
    return int(size), teacher["tail_mass"][size]
