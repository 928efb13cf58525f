"""Our command beside lm-eval called directly: SmolLM2-135M-Instruct on HellaSwag, ARC-easy and PIQA.

`python benchmarks/evaluate.py DATA [--limit 400] [--precision float32]`; DATA has `commonsense/` (docs/evaluation.md);
needs the extras `eval` and `gguf`. Ours reads the GGUF file; lm-eval reads a folder that transformers made of it, and
task definitions that include its own and name the same files. Exits 1 unless values, errors and scores are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from typer.testing import CliRunner

from tailkd import cli
from tailkd.evaluate.commonsense import TASKS, find
from tailkd.models.precision import default_device
from tailkd.pretrained import TEACHER_FILE, teacher_folder

ASKED = ("piqa", "arc_easy", "hellaswag")
BATCH = 8


def ours(tasks: str, data: Path, out: Path, *, limit: int, precision: str) -> dict[str, dict[str, Any]]:
    """The entries that `tailkd evaluate` writes, by task."""
    options = {"--data": data, "--out": out, "--limit": limit, "--precision": precision, "--batch-size": BATCH}
    words = [str(part) for pair in options.items() for part in pair]
    command = ["evaluate", str(teacher_folder() / TEACHER_FILE), "--tasks", tasks, *words]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return {one["task"]: one for one in json.loads((out / "tasks.json").read_text())["results"]}


def direct(task: str, data: Path, model: HFLM, folder: Path, *, limit: int) -> dict[str, Any]:
    """What lm-eval's own entry point gives."""
    own, name = TASKS[task], f"{task}_here"
    definition = next(Path(lm_eval.__file__).parent.joinpath("tasks", own.room).glob(f"**/{_file(task)}.yaml"))
    files = {own.split: str(find([task], data)[task].path)}
    lines = {"include": str(definition), "task": name, "dataset_path": "json", "dataset_name": None}
    lines |= {
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "fewshot_split": own.split,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(lines))  # JSON is YAML
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    found = lm_eval.simple_evaluate(model, tasks=[name], num_fewshot=0, limit=limit, task_manager=manager)
    assert found is not None
    values, samples = found["results"][name], found["samples"][name]
    return {
        "value": values[f"{own.metric},none"],
        "error": values[f"{own.metric}_stderr,none"],
        "scores": [int(sample[own.metric]) for sample in samples],
    }


def _file(task: str) -> str:
    return {"winogrande": "default", "social_iqa": "siqa"}.get(task, task)


def dequantised(folder: Path) -> Path:
    """The model of the GGUF file as a plain folder, by transformers alone."""
    options: dict[str, Any] = {"gguf_file": TEACHER_FILE}
    made = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(teacher_folder(), **options, **made).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder(), **options).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tasks", default=",".join(ASKED))
    given = parser.parse_args()
    equal = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plain = dequantised(folder / "model")
        model = HFLM(pretrained=str(plain), dtype=given.precision, batch_size=BATCH, device=str(default_device()))
        start = time.perf_counter()
        entries = ours(given.tasks, given.data, folder / "ours", limit=given.limit, precision=given.precision)
        print(f"ours: {time.perf_counter() - start:.0f} s, loading included", flush=True)
        for task, found in entries.items():
            start = time.perf_counter()
            expected = direct(task, given.data, model, folder, limit=given.limit)
            same = all(found[key] == expected[key] for key in expected)
            equal &= same
            seconds = time.perf_counter() - start
            print(
                f"{task}: {found['metric']} {100 * found['value']:.2f} ± {100 * found['error']:.2f} %, lm-eval "
                f"{100 * expected['value']:.2f} ± {100 * expected['error']:.2f} %, {found['items']} items, "
                f"{given.precision}, {'equal' if same else 'NOT equal'} item by item; {seconds:.0f} s",
                flush=True,
            )
    sys.exit(not equal)


if __name__ == "__main__":
    main()
