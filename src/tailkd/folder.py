"""The run folder: whose it is, what lies in it at the start, what goes when it starts anew."""

from __future__ import annotations

import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tailkd import recipe_file
from tailkd.errors import Refusal
from tailkd.models import precision
from tailkd.recipe import Recipe
from tailkd.report.record import FORMAT, Run, write_json

RUN_FILES = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "student",
    "data.json",
    "heldout.json",
    "samples.json",
    "evaluation.json",
    "report.html",
    "README.md",
)
VERSIONS = ("tailkd", "torch", "transformers", "tokenizers", "datasets", "numpy")


def holds_a_run(run: Run) -> bool:
    """Whether there is a run in the folder; one that holds anything else is refused."""
    if not run.folder.exists():
        return False
    if not run.folder.is_dir():
        raise Refusal(f"{run.folder} is a file; give another `out`")
    if not any(run.folder.iterdir()):
        return False
    if not (run.folder / "recipe.yaml").is_file():
        raise Refusal(f"{run.folder} holds other files and no recipe.yaml; give another `out`")
    return True


def already_finished(recipe: Recipe, run: Run) -> bool:
    """Whether the folder holds this very run, finished; a folder that holds anything else is refused."""
    if not holds_a_run(run):
        return False
    now, then = recipe.identity(), recipe_file.read(run.folder / "recipe.yaml").identity()
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key)]
    if changed:
        lines = "".join(f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise Refusal(
            f"{run.folder} holds the run of another recipe:{lines}\ngive another `out`, or --fresh to drop it"
        )
    return run.finished


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before a model is loaded; leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        raise Refusal(f"{folder} cannot be written ({error.strerror}); give another `out`") from error


def refuse_small_disk(folder: Path, needed: int) -> None:
    """Refuse a disk with less than `needed` bytes free."""
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise Refusal(
            f"{folder}: checkpoints and student need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; "
            "give another `out`, free some, or keep fewer with training.keep_checkpoints"
        )


def _nearest(folder: Path) -> Path:
    """The folder itself or its first parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def start_folder(recipe: Recipe, run: Run, data: dict[str, Any]) -> None:
    """Make the folder with what is known before training."""
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe_file.write(recipe, run.folder / "recipe.yaml")
    write_json(run.folder / "environment.json", environment())
    write_json(run.folder / "data.json", {"format": FORMAT, **data})


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


def clear(run: Run) -> None:
    """Remove what a run writes, and nothing else."""
    for name in RUN_FILES:
        path = run.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
