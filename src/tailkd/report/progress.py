"""How far a run is and what its last step says, in words: for the live line and for `tailkd status`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RECENT = 50  # steps whose mean time is the speed that a run is expected to go on with
LOSS_PARTS = ("loss", "clm", "divergence", "head_kl", "tail_kl", "hidden")


def seconds_left(recent: Sequence[dict[str, Any]], steps: int) -> float | None:
    """``(steps - step) * mean seconds of the recent steps``, without evaluations and saves; None before two steps."""
    if len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    return (steps - last["step"]) * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def loss_parts(record: dict[str, Any]) -> dict[str, float]:
    """Of a step record: the loss and what it is made of."""
    return {name: record[name] for name in LOSS_PARTS if name in record}


def step_line(record: dict[str, Any], left: float | None = None) -> str:
    """``loss 4.1230  clm 3.9021  divergence 0.2209  lr 1.00e-03  grad 0.812  12,345 tok/s  31 % of peak  3.2 GB  ...``.

    What a record does not know is left out; skipped updates are told where there are any.
    """
    found = [f"{name} {value:.4f}" for name, value in loss_parts(record).items()]
    found += [
        f"lr {record['learning_rate']:.2e}",
        f"grad {record['gradient_norm']:.3f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if "utilisation" in record:
        found.append(f"{100 * record['utilisation']:.0f} % of peak")
    if "memory_bytes" in record:
        found.append(size_shown(record["memory_bytes"]))
    if record.get("skipped_updates"):
        found.append(f"{record['skipped_updates']:,} skipped")
    if left:
        found.append(f"{duration(left)} left")
    return "  ".join(found)


def duration(seconds: float) -> str:
    """``45 s``, ``4 min 05 s``, ``6 h 10 min``, ``3 d 04 h``."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02d} {name}"
    return f"{whole} s"


def size_shown(number: float) -> str:
    """``3.2 GB``, ``14.0 MB``."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
