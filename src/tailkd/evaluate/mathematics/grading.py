"""Is this generated text right? Our own verdict, math-verify's beside it, and the graders' test of themselves."""

from __future__ import annotations

from functools import cache

from tailkd.evaluate.mathematics import judge
from tailkd.evaluate.mathematics.equality import equal
from tailkd.evaluate.mathematics.extraction import extract
from tailkd.evaluate.mathematics.normal import normalised
from tailkd.evaluate.mathematics.tasks import TASKS, task_named


def grade(task: str, generated: str, gold: str) -> bool:
    """``equal(extract(task, generated), normalised(gold))``; for tasks with options, the letter's equality.

    Raises Refusal for an unknown task. Source: docs/evaluation.md.
    """
    return right(task, extract(task, generated), gold)


def right(task: str, extracted: str, gold: str) -> bool:
    """As `grade`, of an answer that `extract` gave."""
    if task_named(task).options:
        return extracted != "" and extracted == gold.strip().upper()
    return equal(extracted, normalised(gold))


def self_test() -> None:
    """A few answers per task whose verdicts are known, once per process.

    Raises RuntimeError with the first that is judged otherwise: nothing is scored by a grader that is broken.
    """
    _tested()


@cache
def _tested() -> None:
    assert {task for task, *_ in CASES} == set(TASKS)
    for task, generated, gold, expected in CASES:
        if grade(task, generated, gold) is not expected:
            raise RuntimeError(
                f"the grader of {task} is broken: {generated!r} against {gold!r} is {not expected}, not {expected}; "
                "nothing was scored. Compare the versions of sympy and tailkd with those of constraints.txt"
            )
    if not judge.can_verify():
        return
    for (generated, gold, expected), found in zip(
        VERIFIED, judge.all_verified([case[:2] for case in VERIFIED]), strict=True
    ):
        if found is not expected:
            raise RuntimeError(f"math-verify is broken: {generated!r} against {gold!r} is {found}, expected {expected}")


CASES: list[tuple[str, str, str, bool]] = [
    ("gsm8k", "6 + 2 = 8. The answer is 8.", "8", True),
    ("gsm8k", "So he has 1,200 dollars. The answer is 1,200 dollars.", "1200", True),
    ("gsm8k", "The answer is 8.", "9", False),
    ("math", r"so \boxed{3}. Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", "0.5", True),
    ("math", r"Hence $\boxed{(x+1)^2}$.", "x^2+2x+1", True),
    ("math", r"Hence $\boxed{(x+1)^2}$.", "x^2+2x+2", False),
    ("math", r"\boxed{[2,5)}", r"\left[ 2, 5 \right)", True),
    ("svamp", "The answer is 145.", "145.0", True),
    ("svamp", "She has 14 left.", "15", False),
    ("asdiv", "The answer is 9 hours.", "9", True),
    ("asdiv", "The answer is 3:30 p.m.", "3:30 pm", True),
    ("mawps", "The answer is 11.50.", "11.5", True),
    ("mawps", "The answer is 11.51.", "11.5", False),
    ("tabmwp", "The answer is 25%.", "0.25", True),
    ("tabmwp", "The answer is Spanish club.", "Spanish club", True),
    ("tabmwp", "The answer is shortage.", "surplus", False),
    ("mathqa", "Final Answer: The final answer is (D).", "D", True),
    ("mathqa", "The answer is a.", "B", False),
    ("sat_math", "The final answer is (B).", "B", True),
    ("sat_math", "It is 5.", "B", False),
]

VERIFIED: list[tuple[str, str, bool]] = [
    (r"so $\boxed{\frac{1}{2}}$", "0.5", True),
    (r"so $\boxed{\frac{1}{3}}$", "0.5", False),
]
