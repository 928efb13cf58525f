"""What a device's matrix products reach here: utilisation is a share of it."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

SIZES = {"cuda": (4096, 20), "cpu": (512, 1)}  # of a square matrix, and products between two looks at the clock
TRIES = 5


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of square products in `dtype` on one device, the fastest of a few; takes a tenth of a second."""
    size, products = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    _seconds(one, other, 1)  # wakes the device up
    return 2 * size**3 * products / min(_seconds(one, other, products) for _ in range(TRIES))


def _seconds(one: torch.Tensor, other: torch.Tensor, products: int) -> float:
    _settle(one.device)
    started = time.perf_counter()
    for _ in range(products):
        torch.mm(one, other)
    _settle(one.device)
    return time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
