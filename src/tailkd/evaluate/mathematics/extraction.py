"""Where in a generated text the answer stands."""

from __future__ import annotations

import re

from tailkd.evaluate.mathematics.normal import normalised
from tailkd.evaluate.mathematics.tasks import task_named

_MINERVA = re.compile(r"final answer is \$(.*?)\$\. I hope", re.DOTALL)
_NUMBER = re.compile(r"-?\d*\.?\d+")
_OPTION = re.compile(r"(?i:answer\s+is:?\s*)(?:\$?\\?(?:boxed\{|text\{)*)\(?([A-Ea-e])(?:\)|(?![a-zA-Z])(?!\s+[a-z]))")


def extract(task: str, generated: str) -> str:
    r"""The answer in a generated text in one spelling (`normal.normalised`), or "" where there is none.

    The first that is found of: the phrase "final answer is $..$. I hope", the last ``\boxed{..}``, the line after the
    last "he answer is", the line after the last "final answer is", the last number. Tasks with options give the letter
    of the last "answer is (X)". Source: docs/evaluation.md. Raises Refusal for an unknown task.
    """
    if task_named(task).options:
        return _option(generated)
    return normalised(_found(generated))


def _found(text: str) -> str:
    if match := _MINERVA.search(text):
        return match[1]
    if "boxed" in text:
        return _boxed(text.rpartition("boxed")[2])
    for phrase in ("he answer is", "final answer is"):
        if phrase in text:
            rest = text.rpartition(phrase)[2].removeprefix(":").strip()
            return rest.partition("\n")[0].rstrip("./ ")
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def _boxed(rest: str) -> str:
    """What stands in the braces that `rest` begins with; to the end where they stay open; without braces, to a $."""
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:place]
    return rest[1:]


def _option(text: str) -> str:
    letters = _OPTION.findall(text)
    if letters:
        return letters[-1].upper()
    answer = normalised(_found(text)).strip("().")
    return answer.upper() if re.fullmatch("[A-Ea-e]", answer) else ""
