"""A task scored sample by sample over a log that goes on where it was cut off."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailkd.errors import Refusal
from tailkd.evaluate.mathematics import judge
from tailkd.evaluate.mathematics.extraction import extract
from tailkd.evaluate.mathematics.grading import right, self_test
from tailkd.evaluate.mathematics.tasks import Item, cut, task_named

FORMAT = 1

Generate = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Sample:
    """What was asked, answered and found. verified: math-verify's verdict, None without it or where it had none."""

    id: str
    question: str
    prompt: str
    generated: str
    extracted: str
    gold: str
    correct: bool
    verified: bool | None = None


def score(
    task: str, items: Sequence[Item], generate: Generate, *, log: str | Path, generator: str, batch_size: int = 16
) -> list[Sample]:
    """A sample for each item, in their order; each is a line of `log` before the next batch is asked for.

    `generate` maps prompts to texts, at most `batch_size` at a time and those of like length together; what follows a
    stop string is cut off here. `generator` names who answers (model, revision, settings): a log goes on by item id,
    and only for the same generator, task and prompts. A torn last line is written again. Raises Refusal for another's
    log, RuntimeError where `self_test` fails or `generate` returns another number of texts.
    """
    self_test()
    path, task = Path(log), task_named(task).name
    known = _logged(path, {"format": FORMAT, "task": task, "generator": generator}, items)
    pending = sorted((item for item in items if item.id not in known), key=lambda item: len(item.prompt))
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            samples = _judged(task, batch, generate([item.prompt for item in batch]))
            file.writelines(json.dumps(asdict(sample)) + "\n" for sample in samples)
            file.flush()
            os.fsync(file.fileno())
            known |= {sample.id: sample for sample in samples}
    return [known[item.id] for item in items]


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """items, accuracy and its standard error in percent, math-verify's accuracy, answers and verdicts not had."""
    count = len(samples)
    share = sum(sample.correct for sample in samples) / max(count, 1)
    verdicts = [sample.verified for sample in samples if sample.verified is not None]
    return {
        "items": count,
        "accuracy": 100 * share,
        "standard_error": 100 * math.sqrt(share * (1 - share) / max(count - 1, 1)),
        "math_verify_accuracy": 100 * sum(verdicts) / len(verdicts) if verdicts else None,
        "without_answer": sum(not sample.extracted for sample in samples),
        "without_verdict": count - len(verdicts),
    }


def _judged(task: str, items: Sequence[Item], texts: Sequence[str]) -> list[Sample]:
    if len(texts) != len(items):
        raise RuntimeError(f"{len(items)} prompts were answered with {len(texts)} texts; expected one each")
    texts = [cut(text) for text in texts]
    pairs = [(text, item.gold) for text, item in zip(texts, items, strict=True)]
    verdicts = judge.all_verified(pairs) if judge.can_verify() else [None] * len(items)
    samples = []
    for item, text, verified in zip(items, texts, verdicts, strict=True):
        extracted = extract(task, text)
        correct = right(task, extracted, item.gold)
        samples.append(Sample(item.id, item.question, item.prompt, text, extracted, item.gold, correct, verified))
    return samples


def _logged(path: Path, head: dict[str, Any], items: Sequence[Item]) -> dict[str, Sample]:
    """The samples of these items that the log has; the log itself is left with a first line and without a torn one."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    whole, torn = lines[:-1], lines[-1]
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head) + "\n", "utf-8")
        return {}
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    try:
        found = json.loads(whole[0])
        samples = {sample.id: sample for sample in (Sample(**json.loads(line)) for line in whole[1:])}
    except (ValueError, TypeError) as error:
        raise Refusal(f"{path} is no log of samples: {error}; move it away to begin anew") from error
    if found != head:
        raise Refusal(f"{path} holds samples of {found}, not of {head}; give another folder or move it away")
    known = {item.id: samples[item.id] for item in items if item.id in samples}
    for item in items:
        if item.id in known and (known[item.id].prompt, known[item.id].gold) != (item.prompt, item.gold):
            raise Refusal(f"{path} has item {item.id} with another prompt or gold answer; move it away to begin anew")
    return known
