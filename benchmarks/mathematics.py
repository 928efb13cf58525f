"""Our verdicts beside published ones: Rho-1's answers to GSM8K and MATH-500, and math-verify on a balanced part.

`python benchmarks/mathematics.py DATA`; DATA has `math/`, `prompts/` and `reference_outputs/` (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailkd.evaluate.mathematics import can_verify, extract, grade, judge, read_items, self_test

OUTPUTS = {"gsm8k": "rho-math-1b-v0.1.gsm8k.cot.jsonl.gz", "math": "rho-math-1b-v0.1.minerva_math.cot.jsonl.gz"}


@dataclass(frozen=True)
class Answer:
    id: int
    generated: str
    gold: str
    published: bool
    published_answer: str
    published_gold: str
    ours: bool


def answers(task: str, data: Path) -> list[Answer]:
    """The published answers, judged by us against the gold answers that we read out of the set's own file."""
    with gzip.open(data / "reference_outputs" / OUTPUTS[task], "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    items = {item.question: item for item in read_items(task, data / "math")}
    found = []
    for row in rows:
        item, text = items[row["question"].strip()], row["code"][0]
        verdict = grade(task, text, item.gold)
        found.append(Answer(row["idx"], text, item.gold, row["score"][0], row["pred"][0], row["gt"], verdict))
    return found


def balanced(found: list[Answer], seed: int = 0) -> list[Answer]:
    """All answers that were published as right, and as many that were published as wrong, drawn with `seed`."""
    right = [answer for answer in found if answer.published]
    wrong = [answer for answer in found if not answer.published]
    return right + random.Random(seed).sample(wrong, len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    self_test()
    for task in OUTPUTS:
        found = answers(task, data)
        apart = [a for a in found if a.published != a.ours]
        share = {"published": sum(a.published for a in found), "ours": sum(a.ours for a in found)}
        accuracy = {name: f"{100 * right / len(found):.2f} %" for name, right in share.items()}
        print(
            f"{task}: {len(found)} answers, agreement {100 * (1 - len(apart) / len(found)):.2f} %, accuracy {accuracy}"
        )
        for a in apart:
            print(
                f"  {a.id}: published {a.published} ({a.published_answer!r} against {a.published_gold!r}), "
                f"ours {a.ours} ({extract(task, a.generated)!r} against {a.gold!r})"
            )
        if can_verify():
            some = balanced(found)
            verdicts = judge.all_verified([(a.generated, a.gold) for a in some])
            same = sum(v == a.ours for v, a in zip(verdicts, some, strict=True))
            print(f"  math-verify: {len(some)} answers, half right; agrees with ours on {100 * same / len(some):.1f} %")
            for v, a in zip(verdicts, some, strict=True):
                if v != a.ours:
                    print(
                        f"    {a.id}: math-verify {v}, ours {extract(task, a.generated)!r} against {a.gold!r}: {a.ours}"
                    )


if __name__ == "__main__":
    main()
