"""What a run says while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tailkd.report.progress import RECENT, seconds_left, step_line
from tailkd.secrets import without_secrets

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class Terminal:
    """Messages and the progress of training, on standard error."""

    def __init__(self, *, steps: int, name: str, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        if not self.console.width:
            self.console.width = 80  # at none rich writes nothing
        self.name, self.steps, self._last = name, steps, 0.0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._live: Live | None = None

    def __enter__(self) -> Terminal:
        if _can_be_redrawn(self.console):
            shown = self._shown(0, "")
            self._live = Live(shown, console=self.console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with suppress(OSError, ValueError):
                self._live.stop()

    def say(self, message: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone, a closed pipe, letters it cannot show
            self.console.print(without_secrets(f"{self.name}: {message}"), markup=False, soft_wrap=True)

    def step(self, record: dict[str, Any]) -> None:
        self._recent.append({"step": record["step"], "seconds": record["seconds"]})
        if self._live is not None:
            self._live.update(self._shown(record["step"], self._line(record)))
            return
        last = record["step"] == self.steps
        if last or time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            self.say(f"step {record['step']:,}/{self.steps:,}  {self._line(record)}")

    def _line(self, record: dict[str, Any]) -> str:
        return step_line(record, seconds_left(self._recent, self.steps))

    def _shown(self, step: int, line: str) -> Group:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(Text(self.name), ProgressBar(self.steps, step, width=30), Text(f"step {step:,}/{self.steps:,}"))
        return Group(bar, Text(line))


def _can_be_redrawn(console: Console) -> bool:
    """Whether this is a terminal that knows escape codes and has a width."""
    if not console.is_terminal or console.is_dumb_terminal:
        return False
    with suppress(OSError, ValueError):
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(console.file.fileno()).columns) > 0
    return False
