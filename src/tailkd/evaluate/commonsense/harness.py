"""lm-eval as it is, given a loaded model and, where they are local, the items. The only file that imports it."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval import tasks as definitions  # pyright: ignore[reportMissingImports]
from lm_eval.api import task as building  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from tailkd.evaluate.commonsense.files import Local
from tailkd.evaluate.commonsense.tasks import Task

Model: Any = HFLM  # its decorator hides its type
SEED = 1234  # lm-eval's own, of the draw of examples


@dataclass(frozen=True)
class Answered:
    """value, error: lm-eval's. samples: one an item, in order. cut: texts that lost their beginning."""

    value: float
    error: float
    samples: list[dict[str, Any]]
    cut: int


class Harness:
    """A model behind lm-eval's interface, its weights in whatever precision they are in."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        with _quiet():  # a copy, since lm-eval may give the tokenizer a padding token
            self.lm = _Counting(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)

    def ask(self, task: Task, local: Local | None, *, shots: int, limit: int | None) -> Answered:
        """All items of a task, or the first `limit`. Raises OSError where the hub does not give them."""
        with _quiet():
            defined = _defined(task, local)
            defined.set_config(key="num_fewshot", value=shots)
            defined.set_fewshot_seed(SEED)
            self.lm.cut = 0
            found: Any = evaluate(lm=self.lm, task_dict={"tasks": {task.name: defined}}, limit=limit)
        values = found["results"][task.name]
        samples = [_sample(task, defined, one) for one in found["samples"][task.name]]
        return Answered(values[f"{task.metric},none"], values[f"{task.metric}_stderr,none"], samples, self.lm.cut)


class _Counting(Model):
    """Counts the texts that are longer than the model's input; its bars are for terminals."""

    cut = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        self.cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **options)


def _defined(task: Task, local: Local | None) -> Any:
    """lm-eval's task, its data set replaced by local items where there are some."""
    own = Path(definitions.__file__).parent / task.room
    manager = definitions.TaskManager(include_defaults=False, include_path=own)
    changed = {"task": task.name} | ({} if local is None else _of_files(task, local))
    return manager.load({"group": task.room, "task": [changed]})["tasks"][task.name]


def _of_files(task: Task, local: Local) -> dict[str, Any]:
    """What differs from lm-eval's definition: where items come from.

    Without training items its rule for such sets holds: examples are other items of the split that is asked.
    """
    parts = {task.split: local.items} | ({} if local.examples is None else {"train": local.examples})
    read = datasets.DatasetDict({split: datasets.Dataset.from_list(items) for split, items in parts.items()})
    same_split = {"training_split": None, "test_split": task.split, "fewshot_split": task.split}
    return {"custom_dataset": lambda **_: read, **({} if local.examples is not None else same_split)}


def _sample(task: Task, defined: Any, logged: dict[str, Any]) -> dict[str, Any]:
    """What one needs to look at an item."""
    item, chances = logged["doc"], [chance for chance, _ in logged["filtered_resps"]]
    contexts, continuations = (list(one) for one in zip(*logged["arguments"], strict=True))
    options = defined.doc_to_choice(item)
    gold = defined.doc_to_text(item) if defined.multiple_input else logged["target"]
    lengths = [len(option) if task.metric == "acc_norm" else 1 for option in options]
    return {
        "item": logged["doc_id"],
        "prompt": contexts[0] if len(set(contexts)) == 1 else contexts,
        "continuations": continuations,
        "log_likelihoods": chances,
        "output": options[int(np.argmax(np.divide(chances, lengths)))],
        "gold": options[gold],
        "score": int(logged[task.metric]),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither lm-eval's account of its defaults, nor bars of what takes no time."""
    logger, bar = logging.getLogger("lm_eval"), building.tqdm
    before, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    building.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        building.tqdm = bar
        logger.setLevel(before)
        if not bars:
            datasets.enable_progress_bars()
