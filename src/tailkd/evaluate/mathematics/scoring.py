"""A task scored sample by sample over a log that goes on where it was cut off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tailkd.evaluate.mathematics import judge
from tailkd.evaluate.mathematics.extraction import extract
from tailkd.evaluate.mathematics.grading import right, self_test
from tailkd.evaluate.mathematics.log import Log, Sample
from tailkd.evaluate.mathematics.tasks import Item, cut, task_named

TOLD_EVERY = 5.0  # seconds


class Answer(NamedTuple):
    """A text that follows a prompt, and what a `Sample` says of it."""

    text: str
    tokens: int | None = None
    finished: bool | None = None
    unasked: str = ""


Generate = Callable[[Sequence[str]], Sequence[Answer]]


class Scored(NamedTuple):
    """seconds: what the answers took, over all attempts; None where they were there already."""

    samples: list[Sample]
    seconds: float | None


def score(
    task: str,
    items: Sequence[Item],
    generate: Generate,
    *,
    log: str | Path,
    generator: str,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> Scored:
    """A sample for each item, in their order; each batch is in the log before the next one is asked for.

    `generate` maps prompts to answers, at most `batch_size` at a time and those of like length together, the longest
    first, so that memory that does not suffice shows at once; what follows a stop string is cut off here. `generator`
    names who answers (model, settings). Cut off and called again, it goes on after the last whole batch; of a whole log
    it gives the samples. Raises Refusal for another's log, RuntimeError where `self_test` fails or `generate` returns
    another number of answers.
    """
    task = task_named(task).name
    self_test()
    samples = Log(Path(log), generator, items)
    if (known := samples.whole()) is not None:
        say(f"{task}: {len(items)} items were answered already: {log}")
        return Scored(known, None)
    with samples.growing() as found:
        say(f"{task}: {len(items)} items" + (f", going on after {len(found)}" if found else ""))
        pending = sorted((item for item in items if item.id not in found), key=lambda item: -len(item.prompt))
        told = time.monotonic()
        for start in range(0, len(pending), batch_size):
            batch, begin = pending[start : start + batch_size], time.monotonic()
            answers = generate([item.prompt for item in batch])
            seconds = time.monotonic() - begin
            judged = _judged(task, batch, answers)
            samples.append(judged, seconds)
            found |= {sample.id: sample for sample in judged}
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                say(f"{task}: {len(found)} of {len(items)}, {sum(sample.correct for sample in found.values())} right")
        whole = [found[item.id] for item in items]
        samples.finish(whole)
    return Scored(whole, samples.seconds)


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Accuracy and its standard error, verdicts in order, and math-verify's accuracy where it has any verdict.

    Both accuracies are fractions. without_answer: no answer was found in the text. without_verdict: of math-verify.
    unasked: prompts that the model has no room for.
    """
    count = len(samples)
    scores = [int(sample.correct) for sample in samples]
    verdicts = [sample.verified for sample in samples if sample.verified is not None]
    share = sum(scores) / max(count, 1)
    return {
        "value": share,
        "error": math.sqrt(share * (1 - share) / max(count - 1, 1)),
        "items": count,
        "scores": scores,
        "verified": sum(verdicts) / len(verdicts) if verdicts else None,
        "without_verdict": count - len(verdicts),
        "without_answer": sum(not sample.extracted for sample in samples),
        "unasked": sum(bool(sample.unasked) for sample in samples),
    }


def _judged(task: str, items: Sequence[Item], answers: Sequence[Answer]) -> list[Sample]:
    if len(answers) != len(items):
        raise RuntimeError(f"{len(items)} prompts were answered with {len(answers)} texts; expected one each")
    texts = [cut(answer.text) for answer in answers]
    pairs = [(text, item.gold) for text, item in zip(texts, items, strict=True)]
    verdicts = judge.all_verified(pairs) if judge.can_verify() else [None] * len(items)
    samples = []
    for item, text, answer, verified in zip(items, texts, answers, verdicts, strict=True):
        extracted = extract(task, text)
        samples.append(
            Sample(
                id=item.id,
                question=item.question,
                prompt=item.prompt,
                generated=text,
                tokens=answer.tokens,
                finished=answer.finished,
                unasked=answer.unasked,
                extracted=extracted,
                gold=item.gold,
                correct=right(task, extracted, item.gold),
                verified=verified,
            )
        )
    return samples
