"""The run folder: whose it is, what lies in it at the start, what goes when it starts anew."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from tailkd import recipe_file
from tailkd.errors import Refusal
from tailkd.ledger.peak import measured_peak
from tailkd.models import precision
from tailkd.recipe import Recipe
from tailkd.report.origins import origins
from tailkd.report.progress import size_shown
from tailkd.report.record import FORMAT, Run, write_json
from tailkd.secrets import masked

RUN_FILES = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "student",
    "data.json",
    "bill.json",
    "origins.json",
    "heldout.json",
    "samples.json",
    "evaluation.json",
    "tasks.json",
    "tasks",
    "report.html",
    "README.md",
    "exit.json",
    "crash.json",
    "track.json",
    "tensorboard",
    "wandb",
)
LOCK = "lock.json"
LOOKED_AT = 0.1  # seconds; `tailkd status` holds a lock for less
VERSIONS = ("tailkd", "torch", "transformers", "tokenizers", "datasets", "numpy")


def store(recipe: Recipe) -> Path:
    """Where prepared tokens lie, and scores beside them."""
    return Path(recipe.data.store).expanduser() if recipe.data.store else shared_store()


def shared_store() -> Path:
    """Where they lie if nobody says another place."""
    return Path(os.environ.get("TAILKD_CACHE") or "~/.cache/tailkd/tokens").expanduser()


def holds_a_run(run: Run) -> bool:
    """Whether there is a run in the folder; one that holds anything else is refused."""
    if not run.folder.exists():
        return False
    if not run.folder.is_dir():
        raise Refusal(f"{run.folder} is a file; give another `out`")
    if not any(path.name != LOCK for path in run.folder.iterdir()):
        return False
    if not (run.folder / "recipe.yaml").is_file():
        raise Refusal(f"{run.folder} holds other files and no recipe.yaml; give another `out`")
    return True


def already_finished(recipe: Recipe, run: Run, allow_change: Set[str] = frozenset()) -> bool:
    """Whether the folder holds this very run, finished; a folder that holds anything else is refused.

    Args:
        allow_change: keys that may differ from those of an unfinished run.
    """
    if not holds_a_run(run):
        return False
    saved = recipe_file.read_saved(run.folder / "recipe.yaml")
    now, then = masked(recipe.identity()), masked(saved.identity())
    if run.finished:  # no update is left to which a changed one could apply
        now, then = {**now, **masked(recipe.optimiser())}, {**then, **masked(saved.optimiser())}
        allow_change = frozenset()
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key) and key not in allow_change]
    if changed:
        lines = "".join(f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise Refusal(
            f"{run.folder} holds the run of another recipe:{lines}\ngive another `out`, take the old values back, "
            "allow a key with --allow-change KEY (an unfinished run), or drop what is there with --fresh"
        )
    return run.finished


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep other processes out of the run folder; the lock of a process that died is free.

    Raises:
        Refusal: naming the process that has it.
    """
    made = not run.folder.exists()
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / LOCK
    file = _lock(path)
    try:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
    finally:
        with suppress(OSError):  # a disk that is read-only by now must not hide why the run ended
            path.unlink(missing_ok=True)
        file.close()
        if made:
            with suppress(OSError):  # holds something by now
                run.folder.rmdir()


def _lock(path: Path) -> IO[str]:
    until = time.monotonic() + LOOKED_AT
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if time.monotonic() < until:
                    time.sleep(LOOKED_AT / 10)
                    continue
                file.seek(0)
                owner = json.loads(file.read() or "{}")
            raise Refusal(
                f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}; wait for it, "
                "stop it, or give another `out`"
            ) from None
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # its owner removed it between the two


def refuse_unwritable(folder: Path, key: str = "out") -> None:
    """Refuse a folder that cannot be made or written, before a model is loaded; leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        raise Refusal(f"{folder} cannot be written ({error.strerror}); give another `{key}`") from error


def refuse_small_disk(folder: Path, needed: int) -> None:
    """Refuse a disk with less than `needed` bytes free; the checkpoints of an interrupted run lie there already."""
    free = shutil.disk_usage(_nearest(folder)).free
    missing = needed - sum(path.lstat().st_size for path in folder.glob("checkpoints/step-*/*.safetensors"))
    if free < missing:
        raise Refusal(
            f"{folder}: checkpoints and student still need {size_shown(missing)}, the disk has {size_shown(free)} "
            "free; give another `out`, free some, or keep fewer with training.keep_checkpoints"
        )


def _nearest(folder: Path) -> Path:
    """The folder itself or its first parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def start_folder(recipe: Recipe, run: Run, data: dict[str, Any]) -> None:
    """Make the folder with what is known before training."""
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe_file.write(recipe, run.folder / "recipe.yaml")
    write_json(run.folder / "environment.json", {**environment(), "matrix_products": _matrix_products(recipe)})
    write_json(run.folder / "data.json", {"format": FORMAT, **data})
    write_json(run.folder / "origins.json", {"format": FORMAT, **origins(recipe.resolved(), fetch=True)})


def environment() -> dict[str, Any]:
    """Versions and hardware; nothing of the user's own environment variables."""
    device = precision.default_device()
    return {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def _matrix_products(recipe: Recipe) -> dict[str, Any]:
    """How fast one device makes them in the precision of the run."""
    device = precision.default_device()
    dtype = precision.resolve(recipe.training.precision, device)
    return {"dtype": str(dtype).removeprefix("torch."), "flops_per_second": measured_peak(device, dtype)}


def clear(run: Run) -> None:
    """Remove what a run writes, and nothing else."""
    for name in RUN_FILES:
        path = run.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
