"""How a run ended, for whoever comes back to it: exit.json, crash.json, five lines; no secret in any of them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tailkd.errors import BUG, DONE, DataError, Refusal, Stop
from tailkd.folder import environment
from tailkd.report.record import FORMAT, Run, write_json
from tailkd.secrets import without_secrets


@contextmanager
def noted(run: Run, *, leads: bool = True) -> Iterator[None]:
    """Write exit.json when the body ends, and crash.json when it ends by an error that was not foreseen.

    Such an error carries five lines for the terminal as its note.
    """
    if leads:
        for name in ("exit.json", "crash.json"):
            (run.folder / name).unlink(missing_ok=True)
    try:
        yield
    except Refusal:
        raise
    except Stop as stop:
        _note(run, stop.exit_code, str(stop), leads)
        raise
    except Exception as error:
        step = last_step(run)
        _note(run, BUG, f"{type(error).__name__}: {error}", leads)
        with suppress(OSError):
            write_json(run.folder / "crash.json", crash_report(error, step))
        error.add_note(_five_lines(run, error, step))
        raise
    _note(run, DONE, "finished", leads)


@contextmanager
def on_disk(run: Run) -> Iterator[None]:
    """For what is written outside training: a disk that does not take it ends the run with code 78, not as a bug.

    Raises:
        DataError: with the disk's words.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{run.folder} cannot be written any more ({error}); what is saved stands: make room and run the same "
            "command"
        ) from error


def _note(run: Run, code: int, message: str, leads: bool) -> None:
    if leads and run.folder.is_dir():
        content = {"format": FORMAT, "exit_code": code, "message": without_secrets(message), "step": last_step(run)}
        with suppress(OSError):
            write_json(run.folder / "exit.json", content)


def crash_report(error: BaseException, step: int) -> dict[str, Any]:
    """What, where, versions, last step."""
    trace = "".join(traceback.format_exception(error))
    return {
        "format": FORMAT,
        "what": without_secrets(f"{type(error).__name__}: {error}"),
        "where": without_secrets(trace).splitlines(),
        "last_step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": environment(),
    }


def last_step(run: Run) -> int:
    """The last step that metrics.jsonl has a whole record of."""
    with suppress(OSError, ValueError, Refusal):
        return max((record["step"] for record in Run(run.folder).metrics if record["kind"] == "step"), default=0)
    return 0


def _five_lines(run: Run, error: BaseException, step: int) -> str:
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("step-*"))
    return "\n".join(
        (
            without_secrets(f"stopped after step {step:,} by {type(error).__name__}: {_short(str(error))}"),
            f"  where: {run.folder / 'crash.json'} has the traceback and the versions",
            f"  saved: {kept[-1] if kept else 'no checkpoint yet'} in {run.folder / 'checkpoints'}",
            "  go on: run the same command again; it starts from there",
            "  if it stops at the same step again, report it with crash.json (no secret is in it)",
        )
    )


def _short(text: str) -> str:
    line = (text.splitlines() or [""])[0]
    return line if len(line) < 300 else line[:300] + "…"
