"""The tools that a recipe asks to show its run: started beside it, looked after, and never waited for in training."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from tailkd.errors import Refusal
from tailkd.report.record import FORMAT, Run, write_json
from tailkd.track.follow import WHOLE

LOOK_EVERY = 1.0  # seconds
FAREWELL = 30.0  # seconds that a tool has for what is left when the run is whole
SHORT_FAREWELL = 5.0  # and when it was interrupted


def refuse_missing(names: Sequence[str]) -> None:
    """Refuse a tool whose package is not installed, before anything is done."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Refusal(
                f"track.{name} needs the package {name}, which is not installed; `pip install 'tailkd[track]'`, or "
                f"remove track.{name}"
            )


class Trackers:
    """``with Trackers(names, run, say) as trackers``: `follow` starts a process for each tool, `look` sees if all live.

    The processes read the run's metrics.jsonl, so nothing is handed to them that could be lost or wait. One that ends
    before its time is said once, and that tool is off for the rest of the run.
    """

    def __init__(self, names: Sequence[str], run: Run, say: Callable[[str], None]) -> None:
        self.names, self.run, self.say = names, run, say
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._looked = 0.0

    def follow(self) -> None:
        """Start the tools; metrics.jsonl stands where the run goes on from."""
        if not self.names:
            return
        try:
            self._start(_key(self.run))
        except Exception as error:  # whatever it is, the run is worth more
            self.say(f"track is off: {error}")

    def _start(self, key: str) -> None:
        for name in self.names:
            command = [sys.executable, "-P", "-m", "tailkd.track.follow", name, str(self.run.folder.absolute()), key]
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is the run's, and all that a tool starts ends with it
            )

    def look(self) -> None:
        """Say which tools have given up."""
        if self._running and time.monotonic() - self._looked > LOOK_EVERY:
            self._looked = time.monotonic()
            for name in [name for name, process in self._running.items() if process.poll() is not None]:
                self.say(f"track.{name} is off: {_why(self._running[name])}. The run goes on, metrics.jsonl has it all")
                _end(self._running.pop(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(whole=kind is None)
        finally:
            for process in self._running.values():
                _end(process)

    def _close(self, *, whole: bool) -> None:
        for process in self._running.values():
            assert process.stdin is not None
            with suppress(OSError):
                if whole:
                    process.stdin.write(WHOLE)
                process.stdin.close()
        until = time.monotonic() + (FAREWELL if whole else SHORT_FAREWELL)
        for name, process in self._running.items():
            try:
                if process.wait(max(0.0, until - time.monotonic())):
                    self.say(f"track.{name} was off at the end: {_why(process)}. metrics.jsonl has it all")
            except subprocess.TimeoutExpired:
                self.say(f"track.{name} was not done in time and may lack the last steps; metrics.jsonl has it all")


def _key(run: Run) -> str:
    """Of the run in all tools, the same when it goes on."""
    path = run.folder / "track.json"
    if not path.is_file():
        write_json(path, {"format": FORMAT, "key": secrets.token_hex(4)})
    return Run(run.folder).track["key"]


def _why(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    with suppress(OSError):
        if said := os.read(process.stdout.fileno(), 4096):
            return said.decode(errors="replace")
    if process.returncode == -signal.SIGALRM:
        return "it did not answer"
    return f"it ended with code {process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its process and all that it started; one that the system cannot end now is left to it."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
