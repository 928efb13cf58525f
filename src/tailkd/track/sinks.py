"""The tools that show a run: each opens it, takes numbers by step, and ends it.

They run in a process of their own (`follow`), so they may block, raise or exit as they like.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

NOTHING = -1

QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
"""They send the run's numbers and its recipe, and nothing of the machine; a variable that is set already stays."""


class Sink(Protocol):
    """A run that is open in a tool; `last` is the last step that the tool has of it, -1 for none."""

    last: int

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def finish(self, *, whole: bool) -> None: ...


def open_sink(name: str, folder: Path, recipe: dict[str, Any], key: str) -> Sink:
    """The tool's run of this folder, the same one whenever the run goes on: `key` tells it from others of its name."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    return SINKS[name](folder, recipe, key)


class TensorBoard:
    """Event files in the run folder, written anew from the first record each time."""

    def __init__(self, folder: Path, recipe: dict[str, Any], key: str) -> None:
        load = importlib.import_module  # of generated modules no checker knows the names
        self._event, self._summary = (load(f"tensorboard.compat.proto.{name}_pb2") for name in ("event", "summary"))
        own = folder / "tensorboard"
        for old in own.glob("events.out.tfevents.*"):
            old.unlink()
        self.last = NOTHING
        writers = load("tensorboard.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(own), flush_secs=5)

    def log(self, numbers: dict[str, float], step: int) -> None:
        summary = self._summary.Summary
        values = [summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary(value=values)))

    def finish(self, *, whole: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; its own files lie in the run folder."""

    def __init__(self, folder: Path, recipe: dict[str, Any], key: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        asked = recipe["track"]["wandb"]
        self._run = wandb.init(
            project=asked["project"],
            entity=asked["entity"],
            group=asked["group"],
            mode="offline" if asked["offline"] else None,
            id=key,
            name=recipe["name"],
            resume="allow",
            dir=str(folder),
            config=recipe,
        )
        self.last = self._run.step - 1

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def finish(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class Trackio:
    """A run of trackio, on this machine or in a Space."""

    def __init__(self, folder: Path, recipe: dict[str, Any], key: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        asked, name = recipe["track"]["trackio"], f"{recipe['name']}-{key}"
        self._run = trackio.init(
            project=asked["project"],
            name=name,
            space_id=asked["space"],
            private=True,
            resume="allow",
            config=recipe,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.last = getattr(self._run, "_next_step", 0) - 1  # trackio has no public name for it

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def finish(self, *, whole: bool) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, dict[str, Any], str], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
