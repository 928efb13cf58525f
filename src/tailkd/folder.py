"""The run folder: whose it is, what lies in it at the start, what goes when it starts anew."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
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
    "evaluation.json",
    "report.html",
    "README.md",
)
VERSIONS = ("tailkd", "torch", "transformers", "tokenizers", "datasets", "numpy")


def already_finished(recipe: Recipe, run: Run) -> bool:
    """Whether the folder holds this very run, finished; a folder that holds anything else is refused."""
    if not run.folder.exists() or not any(run.folder.iterdir()):
        return False
    if not (run.folder / "recipe.yaml").is_file():
        raise Refusal(f"{run.folder} holds other files and no recipe.yaml; give another `out`")
    now, then = recipe.identity(), recipe_file.read(run.folder / "recipe.yaml").identity()
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key)]
    if changed:
        lines = "".join(f"\n  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise Refusal(
            f"{run.folder} holds the run of another recipe:{lines}\ngive another `out`, or --fresh to drop it"
        )
    return run.finished


def start_folder(recipe: Recipe, run: Run) -> None:
    """Make the folder with what is known before training."""
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe_file.write(recipe, run.folder / "recipe.yaml")
    write_json(run.folder / "environment.json", environment())


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
