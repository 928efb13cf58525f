"""What a process holds."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def held_bytes(device: torch.device) -> int | None:
    """The most that a GPU had allocated so far; of a CPU the resident set now. None where the system does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmRSS")


def status_bytes(name: str) -> int | None:
    """A line of /proc/self/status."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)
