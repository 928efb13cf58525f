"""Looks at the machine: what tailkd needs, what is there, what to do about the difference."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

LEAST_TRANSFORMERS, LEAST_TORCH, LEAST_DISK_GB = (5, 3), (2, 6), 2


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    good: bool
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything looked at, good or not."""
    return [
        _python(),
        _package("torch", LEAST_TORCH),
        _package("transformers", LEAST_TRANSFORMERS),
        *_device(),
        _disk(),
    ]


def _python() -> Finding:
    return Finding("python", platform.python_version(), sys.version_info >= (3, 11), "take Python 3.11 or later")


def _package(name: str, least: tuple[int, int]) -> Finding:
    wanted = ".".join(map(str, least))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", False, f"pip install '{name}>={wanted}'")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return Finding(name, version, numbers >= least, f"pip install '{name}>={wanted}' (older ones run code from files)")


def _device() -> list[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = [Finding("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GB", True)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB", True))
    return found or [Finding("GPU", "none", True)]


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    return Finding("disk", f"{free:.0f} GB free here", free >= LEAST_DISK_GB, f"free at least {LEAST_DISK_GB} GB")
