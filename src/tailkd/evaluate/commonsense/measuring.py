"""Tasks asked one after another, each with its entry for tasks.json and its samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from tailkd.errors import OutOfMemory, Refusal
from tailkd.evaluate.commonsense.files import Local
from tailkd.evaluate.commonsense.tasks import TASKS, Task

if TYPE_CHECKING:
    from tailkd.evaluate.commonsense.harness import Answered

SAMPLES = Path("tasks") / "commonsense"


def can_measure() -> bool:
    """Whether lm-eval is there."""
    return find_spec("lm_eval") is not None


def measured(
    model: Any,
    tokenizer: Any,
    sources: Mapping[str, Local | None],
    *,
    shots: Sequence[int],
    out: Path,
    limit: int | None,
    batch_size: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """An entry of tasks.json for each task and number of shots; samples are written below `out` before it comes.

    Equals ``lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=[task],
    num_fewshot=shots, limit=limit)`` on the same items: value, error and the score of each item.

    Args:
        sources: task -> its local items, None for the items of the hub.
        limit: the first so many items of each task.

    Raises:
        Refusal: items that the hub does not give.
        OutOfMemory: a batch does not fit.
    """
    from tailkd.evaluate.commonsense.harness import Harness

    harness = Harness(model, tokenizer, batch_size)
    for name, local in sources.items():
        task = TASKS[name]
        for number in shots:
            say(f"{name}, {number} shots")
            try:
                answered = harness.ask(task, local, shots=number, limit=limit)
            except OSError as error:  # the hub's errors are kinds of it
                if local is not None:
                    raise
                raise Refusal(
                    f"the items of {name} did not come from the hub ({_first(error)}); give a folder with the sets "
                    "by --data"
                ) from error
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(f"{name}: {batch_size} texts do not fit into memory; lower --batch-size") from error
            _tell(answered, name, number, local, say)
            yield _entry(task, number, limit, local, answered, out)


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _tell(answered: Answered, name: str, shots: int, local: Local | None, say: Callable[[str], None]) -> None:
    """What a reader of the number must know."""
    if shots and local is not None and local.examples is None:
        say(f"{name}: no training file beside {local.path.name}; its examples are drawn from the other items")
    if answered.cut:
        say(f"{name}, {shots} shots: {answered.cut:,} texts were longer than the model reads and lost their beginning")


def _entry(
    task: Task, shots: int, limit: int | None, local: Local | None, answered: Answered, out: Path
) -> dict[str, Any]:
    name = f"{task.name}-{shots}.jsonl" if limit is None else f"{task.name}-{shots}-first-{limit}.jsonl"
    path = out / SAMPLES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.tmp")
    temporary.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in answered.samples), "utf-8")
    temporary.replace(path)
    asked = [[sample["prompt"], sample["continuations"]] for sample in answered.samples]
    return {
        "task": task.name,
        "suite": "commonsense",
        "shots": shots,
        "metric": task.metric,
        "value": answered.value,
        "error": answered.error,
        "items": len(answered.samples),
        "limit": limit,
        "data": None if local is None else local.path.name,
        "examples": local.examples_path.name if shots and local is not None and local.examples_path else None,
        "items_hash": xxhash.xxh3_64_hexdigest(json.dumps(asked).encode()),
        "scores": [sample["score"] for sample in answered.samples],
        "samples": str(SAMPLES / name),
    }
