"""`tailkd status`: how a run stands, from its folder alone, also while another process trains it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tailkd.report.progress import RECENT, duration, loss_parts, seconds_left, size_shown
from tailkd.report.record import Run, checked

BLOCK = 1 << 16
HELD_OUT = ("cross_entropy", "kl", "full_ece")


def status(run: Run) -> dict[str, Any]:
    """What is known of a run now; what is not known yet is None.

    state: "running"; "finished"; "stopped", with exit_code and message; "killed" where it ended without a word.
    seconds_left: of the steps that are to come, at the mean speed of the last 50; only of a running one.

    Raises:
        Refusal: this is no run folder.
    """
    running = held(run.folder / "lock.json")
    if running and not (run.folder / "recipe.yaml").is_file():
        return {"name": run.folder.name, "folder": str(run.folder), "state": "preparing"}
    training, ending = run.recipe["training"], _read(run.folder / "exit.json")
    steps = -(-training["tokens"] // (training["batch_size"] * run.recipe["data"]["context"]))
    recent, evaluation = last_records(run.folder / "metrics.jsonl")
    last = recent[-1] if recent else {}
    state = "running" if running else "finished" if run.finished else "stopped" if ending else "killed"
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": state,
        "exit_code": ending.get("exit_code"),
        "message": ending.get("message"),
        "step": last.get("step", 0),
        "steps": steps,
        "tokens": last.get("tokens", 0),
        "loss_parts": loss_parts(last),
        "learning_rate": last.get("learning_rate"),
        "gradient_norm": last.get("gradient_norm"),
        "tokens_per_second": last.get("tokens_per_second"),
        "utilisation": last.get("utilisation"),
        "memory_bytes": last.get("memory_bytes"),
        "skipped_updates": last.get("skipped_updates", 0),
        "seconds_left": seconds_left(recent, steps) if running else None,
        "heldout": {name: evaluation.get(name) for name in ("step", "tokens_trained", *HELD_OUT)},
        "checkpoint": _checkpoint(run.folder),
        "disk_bytes": _disk(run.folder),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A status for a reader."""
    yield f"{found['name']} ({found['folder']}): {_ending(found)}"
    if found["state"] == "preparing":
        return
    left = found["seconds_left"]
    yield f"  step {found['step']:,} of {found['steps']:,}, {found['tokens']:,} tokens" + (
        "" if left is None else f", {duration(left)} left"
    )
    if parts := found["loss_parts"]:
        yield (
            "  "
            + "  ".join(f"{name} {value:.4f}" for name, value in parts.items())
            + (f"  lr {found['learning_rate']:.2e}  grad {found['gradient_norm']:.3f}")
        )
        yield "  " + ", ".join(_machine(found))
    heldout = found["heldout"]
    if heldout["step"] is not None:
        measured = "  ".join(f"{name} {heldout[name]:.4f}" for name in HELD_OUT if heldout[name] is not None)
        yield f"  held out at step {heldout['step']:,}: {measured}"
    saved = found["checkpoint"]
    when = f"step {saved['step']:,}, {duration(saved['age_seconds'])} ago" if saved else "none yet"
    yield f"  last checkpoint: {when}; {size_shown(found['disk_bytes'])} on the disk"


def _ending(found: dict[str, Any]) -> str:
    if found["state"] == "stopped":
        return f"stopped with code {found['exit_code']}: {found['message']}"
    if found["state"] == "killed":
        return "ended without a word, as a killed process does; the same command goes on"
    return found["state"]


def _machine(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['tokens_per_second']:,.0f} tok/s"
    if found["utilisation"] is not None:
        yield f"{100 * found['utilisation']:.0f} % of peak"
    if found["memory_bytes"] is not None:
        yield f"{size_shown(found['memory_bytes'])} of memory"
    yield f"{found['skipped_updates']:,} updates skipped"


def held(lock: Path) -> bool:
    """Whether a living process has the lock of a run folder."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last_records(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last steps, oldest first, and the student's last evaluation; reads no more of the file than it must.

    Raises:
        Refusal: a file of another format.
    """
    steps: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    for record in map(json.loads, _from_the_end(path)):
        if record["kind"] == "header":
            checked(record, path)
        elif record["kind"] == "step" and len(steps) < RECENT:
            steps.append(record)
        elif record["kind"] == "evaluation" and record["role"] == "student":
            evaluation = evaluation or record
        if evaluation and len(steps) == RECENT:
            break
    return steps[::-1], evaluation


def _from_the_end(path: Path) -> Iterator[bytes]:
    """Whole lines, the last one first; one that is being written is none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        at, rest = file.seek(0, 2), b""
        whole = False
        while at:
            size = min(BLOCK, at)
            at -= size
            file.seek(at)
            rest = file.read(size) + rest
            if not whole:
                cut = rest.rfind(b"\n")
                rest, whole = (rest[: cut + 1], True) if cut >= 0 else (b"", False)
            first, *found = rest.split(b"\n")
            yield from (line for line in reversed(found) if line)
            rest = first
        if whole and rest:
            yield rest


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return checked(json.loads(path.read_text()), path)
    return {}


def _checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest one, and how old it is."""
    found = {}
    for path in (folder / "checkpoints").glob("step-*"):
        with suppress(OSError, ValueError):  # gone by now, or no number
            found[int(path.name.removeprefix("step-"))] = time.time() - path.stat().st_mtime
    return {"step": max(found), "age_seconds": found[max(found)]} if found else None


def _disk(folder: Path) -> int:
    """Bytes of all its files; one that goes meanwhile has none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total
