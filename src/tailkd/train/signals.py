"""A run that is asked to stop, by a signal or by the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tailkd.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 instead of dying of them, while it is entered; a second SIGINT ends at once.

    Args:
        stop_after: seconds from now after which to stop as if asked to; None for never.
        agree: the largest of a number over all processes, so that all of them stop at one place.
    """

    def __init__(self, stop_after: float | None = None, agree: Callable[[int], int] = lambda asked: asked) -> None:
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._agree = agree
        self._asked = 0  # number of the last signal that came
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            os._exit(128 + signal.SIGINT)  # meant at once: no clean-up that could take time
        self._asked = number

    def heed(self) -> None:
        """Raise if any process was asked to stop; called between micro-batches and between held-out batches.

        Raises:
            Preempted: naming the signal or the limit.
        """
        late = self._deadline is not None and time.monotonic() > self._deadline
        asked = self._agree(self._asked or (CLOCK if late else 0))
        if asked:
            cause = "training.stop_after is over" if asked == CLOCK else f"{signal.Signals(asked).name} came"
            raise Preempted(f"{cause}; the same command goes on from what is saved")


CLOCK = 10_000  # beyond every signal's number
