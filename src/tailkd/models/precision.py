"""The one place that decides in which precision products run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from tailkd.errors import Refusal


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the products: `auto` is bfloat16 where the device is a GPU that has it, float32 elsewhere."""
    if precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal("training.precision is bfloat16 but this GPU has none; take float32")
    return getattr(torch, precision)


def compute(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Products in `dtype` over float32 master parameters; nothing at all for float32 (and for float64 models)."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
