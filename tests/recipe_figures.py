"""What the heads of the packaged recipes say of tokens, hours and memory: ``python tests/recipe_figures.py`` writes it.

The ledger makes it out for H100s from the published models' configurations; `test_recipes.py` holds the files to it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tailkd import bill, catalogue, recipe_file
from tailkd.ledger import published
from tailkd.recipe import Recipe

PUBLISHED = {
    "Qwen/Qwen1.5-1.8B": "Qwen1.5-1.8B",
    "microsoft/phi-2": "Phi-2",
    "Qwen/Qwen2.5-3B": "Qwen2.5-3B",
    "google/gemma-2-9b": "Gemma2-9B",
    "microsoft/Phi-3-mini-4k-instruct": "Phi-3-mini",
    "microsoft/Phi-3-medium-4k-instruct": "Phi-3-medium",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-480k-1T": "TinyLlama-1.1B",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1195k-token-2.5T": "TinyLlama-1.1B",
    "meta-llama/Llama-2-7b-hf": "Llama-2-7B",
    "MiniLLM/Ref-Pretrain-Qwen-104M": "Qwen-104M",
    "facebook/opt-125m": "OPT-125M",
    "facebook/galactica-125m": "Galactica-125M",
    "microsoft/rho-math-1b-v0.1": "TinyLlama-1.1B",
}
"""Hub ids in the recipes, and the models of `tailkd.ledger.published`."""

GPU = torch.device("cuda")
ORCAMEL_ROWS = 40_000  # 250,000 examples of about 330 tokens in rows of 2,048: an estimate, as the files say


def first_stage(run: str) -> Path:
    """The packaged recipe whose run a second stage goes on from, by the run's folder."""
    return next(path for path in catalogue.files() if f"\nname: {Path(run).name}\n" in path.read_text())


def copied_tree(
    folder: Path,
    change: Callable[[dict[str, Any]], None],
    reference: Callable[[str], Path],
    start: Callable[[str], dict[str, str]],
) -> Path:
    """All recipes of the package in a folder, each base.yaml changed by a function; what extends them is as it was.

    But for the reference models that they name, for which a function gives folders, and the runs that a second stage
    goes on from, in whose place another one puts a start.
    """
    shutil.copytree(catalogue.RECIPES, folder, dirs_exist_ok=True)
    for path in folder.rglob("*.yaml"):
        values = recipe_file.yaml().load(path)
        if path.name == catalogue.BASE:
            change(values)
        for name, key in (("data", "select"), ("objective", "tokens")):
            section = values.get(name, {}).get(key)
            if section:
                section["reference"] = str(reference(section["reference"]))
        if values.get("student", {}).get("run"):
            values["student"] |= {"run": None, **start(values["student"]["run"])}
        with path.open("w") as file:
            recipe_file.yaml().dump(values, file)
    return folder


@contextmanager
def made_out() -> Iterator[Callable[[Path], Recipe]]:
    """A function that reads a packaged recipe with the published configurations for its models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def saved(hub_id: str) -> Path:
            model = PUBLISHED[hub_id]
            published.config(model).save_pretrained(folder / "models" / model)
            return folder / "models" / model

        def change(values: dict[str, Any]) -> None:
            for role in ("teacher", "student"):
                if "model" in values[role]:
                    values[role]["model"] = str(saved(values[role]["model"]))

        def start(run: str) -> dict[str, str]:
            base = recipe_file.yaml().load(first_stage(run).with_name(catalogue.BASE))
            return {"model": str(saved(base["student"]["model"]))}

        tree = copied_tree(folder / "recipes", change, saved, start)
        yield lambda path: recipe_file.read(tree / path.relative_to(catalogue.RECIPES), files=False)


def figures(recipe: Recipe) -> dict[str, str]:
    """Tokens, hours on all of the recipe's GPUs, and memory on one of them, as a recipe's head has them."""
    with mock.patch("torch.cuda.is_bf16_supported", return_value=True):  # made out for a GPU, on any machine
        settled = bill.settled(recipe, rows=ORCAMEL_ROWS)
        found = bill.bill(settled, device=GPU)
    hardware = recipe.hardware
    assert hardware.peak_flops is not None
    rate = f"at {hardware.utilisation:.0%} of {hardware.peak_flops * 1e-12:.0f} TFLOP/s".replace("%", " %")
    return {
        "tokens": f"{settled.tokens:,}",
        "hours": f"{found.hours:.1f} {rate}{' each' if hardware.devices > 1 else ''}",
        "memory": f"{found.memory.total / 1e9:.1f} GB on one GPU that holds everything",
    }


def main() -> None:
    with made_out() as read:
        for path in catalogue.files():
            text = path.read_text()
            for key, value in figures(read(path)).items():
                text = re.sub(rf"^# {key}: .*$", f"# {key}: {value}", text, count=1, flags=re.MULTILINE)
            path.write_text(text)
            print(path.relative_to(catalogue.RECIPES), catalogue.header(path)["hours"], flush=True)


if __name__ == "__main__":
    main()
