"""What a run says while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tailkd.secrets import without_secrets

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class Terminal:
    """Messages and the progress of training, on standard error."""

    def __init__(self, *, steps: int, name: str, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.name, self.steps, self._last = name, steps, 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task(self.name, total=self.steps, line="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.stop()

    def say(self, message: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone, a closed pipe, letters it cannot show
            self.console.print(without_secrets(f"{self.name}: {message}"), markup=False, soft_wrap=True)

    def step(self, record: dict[str, Any]) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], line=step_line(record))
            return
        last = record["step"] == self.steps
        if last or time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            self.say(f"step {record['step']}/{self.steps}  {step_line(record)}")


def step_line(record: dict[str, Any]) -> str:
    """``loss 4.123  clm 3.9  divergence 0.2  lr 1.0e-03  grad 0.8  12,345 tok/s``."""
    parts = [
        f"{name} {record[name]:.4f}" for name in ("loss", "clm", "divergence", "head_kl", "tail_kl") if name in record
    ]
    rest = (
        f"lr {record['learning_rate']:.2e}",
        f"grad {record['gradient_norm']:.3f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    )
    return "  ".join([*parts, *rest])
