"""What a thread of every process does together: a save is written by all of them while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tailkd.errors import Diverged, Refusal
from tailkd.train.ranks import timeout, waiting_for

T = TypeVar("T")


class Collective:
    """The processes of this run. Collectives run on a gloo group of their own, so that a thread may call them.

    Without `torch.distributed` there is one rank and nothing is sent.
    """

    def __init__(self) -> None:
        on = dist.is_available() and dist.is_initialized()
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout()) if on else None  # type: ignore[assignment]
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)

    def gather(self, work: Callable[[], T]) -> list[T]:
        """``work()`` of every rank in order; what one of them raises, all of them raise."""
        if self.world == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            sendable = isinstance(caught, OSError | Refusal | Diverged)
            error = caught if sendable else RuntimeError(f"rank {self.rank}: {caught!r}")
        told: list[Any] = [None] * self.world
        with waiting_for("to save or to resume together"):
            dist.all_gather_object(told, (result, error), group=self.group)
        for _, failure in told:
            if failure is not None:
                raise failure
        return [value for value, _ in told]

    def first(self, work: Callable[[], T]) -> T:
        """``work()`` of rank 0, for all."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]
