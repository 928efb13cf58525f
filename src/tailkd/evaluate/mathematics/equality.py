"""When two answers, both in the one spelling of `normalised`, say the same."""

from __future__ import annotations

import cmath
import re
from collections.abc import Iterator, Sequence

from tailkd.evaluate.mathematics.judge import symbolic
from tailkd.evaluate.mathematics.latex import Unreadable, number, read

RELATIVE_TOLERANCE = 1e-4
LONGEST = 300  # characters: a model that repeats itself gave no answer
_PLAIN = re.compile(r"-?(?:\d+(?:,\d{3})*\.?\d*|\.\d+)")
_MATRIX = re.compile(r"\\begin\{(?:small)?pmatrix\}(.*)\\end\{(?:small)?pmatrix\}")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|ne|in|to|equiv)(?![a-zA-Z])")


def equal(answer: str, gold: str) -> bool:
    """By the first of these rules that applies.

    1. The same string, whatever the case; 2. plain numbers within 1e-4 of the gold one, of 100 times it or of a 100th
    (percent); 3. unions, matrices, tuples and intervals part by part with the same brackets, sets and bare lists in any
    order, one bracketed answer without its brackets; 4. equations up to a factor; 5. formulas without unknowns by their
    value within 1e-4; 6. others by sympy in a process of its own (`judge.symbolic`), unequal where that takes over 3 s.
    """
    if answer.lower() == gold.lower():
        return True
    if not answer or not gold or len(answer) > LONGEST:
        return False
    a, g = _plain(answer), _plain(gold)
    if a is not None and g is not None:
        return any(_close(a, scale * g) for scale in (1.0, 0.01, 100.0))
    parts = _by_parts(answer, gold)
    if parts is not None:
        return parts
    return _formulas(answer, gold)


def _plain(text: str) -> float | None:
    return float(text.replace(",", "")) if _PLAIN.fullmatch(text) else None


def _close(a: complex, g: complex) -> bool:
    return cmath.isfinite(a) and abs(a - g) <= RELATIVE_TOLERANCE * max(abs(a), abs(g))


# ----- answers of several parts


def _by_parts(answer: str, gold: str) -> bool | None:
    """None where neither answer has parts."""
    for split, ordered in ((_union, False), (_rows, True)):
        a, g = split(answer), split(gold)
        if a or g:
            return _same(a or [answer], g or [gold], ordered=ordered)
    (a_open, a_parts, a_close), (g_open, g_parts, g_close) = _members(answer), _members(gold)
    if len(a_parts) == len(g_parts) == 1:
        inner_a, inner_g = (a_parts[0] if a_open else answer), (g_parts[0] if g_open else gold)
        bare = (inner_a, inner_g) != (answer, gold)
        return equal(inner_a, inner_g) if bare else None
    brackets = {a_open + a_close, g_open + g_close} - {""}
    if len(brackets) > 1:
        return False
    return _same(a_parts, g_parts, ordered=not brackets <= {"{}"})


def _same(a: Sequence[str], g: Sequence[str], *, ordered: bool) -> bool:
    if len(a) != len(g):
        return False
    if ordered:
        return all(equal(x, y) for x, y in zip(a, g, strict=True))
    left = list(g)
    for x in a:
        match = next((y for y in left if equal(x, y)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _union(text: str) -> list[str]:
    parts = text.split(r"\cup")
    return parts if len(parts) > 1 else []


def _rows(text: str) -> list[str]:
    """The shape and the entries of a matrix, row by row; [] for anything else."""
    match = _MATRIX.fullmatch(text.removeprefix("(").removesuffix(")"))
    if match is None:
        return []
    rows = [row.split("&") for row in re.split(r"\\\\", match[1].removesuffix("\\\\"))]
    return [f"{len(rows)};{len(rows[0])}", *(entry for row in rows for entry in row)]


def _members(text: str) -> tuple[str, list[str], str]:
    """Opening bracket, members and closing bracket; brackets are "" where they do not hold the whole."""
    first, last = text[0], text[-1]
    whole = len(text) > 1 and first in "([{" and last in ")]}" and _closing(text) == len(text) - 1
    inner = text[1:-1] if whole else text
    members = [alternative for member in _split(inner) for alternative in _alternatives(member)]
    return (first, members, last) if whole else ("", members, "")


def _closing(text: str) -> int:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place
    return -1


def _split(text: str) -> Iterator[str]:
    """At the commas outside brackets."""
    depth = start = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _alternatives(member: str) -> list[str]:
    r"""``1\pm\sqrt{2}`` is two answers."""
    if member.count(r"\pm") != 1:
        return [member]
    return [member.replace(r"\pm", sign).removeprefix("+") for sign in "+-"]


# ----- formulas


def _formulas(answer: str, gold: str) -> bool:
    relations = _RELATION.findall(answer), _RELATION.findall(gold)
    if relations != ([], []):
        if relations != (["="], ["="]):
            return False
        (a, _, b), (c, _, d) = answer.partition("="), gold.partition("=")
        return _symbolic(f"{a}-({b})", f"{c}-({d})", up_to_a_factor=True)
    if any(text.isalpha() and len(text) > 1 for text in (answer, gold)):
        return False  # words, and no product of their letters
    a, g = number(answer), number(gold)
    if a is not None and g is not None:
        return _close(a, g)
    return _symbolic(answer, gold)


def _symbolic(answer: str, gold: str, *, up_to_a_factor: bool = False) -> bool:
    try:
        a, g = read(answer), read(gold)
    except Unreadable:
        return False
    return bool(symbolic(a, g, up_to_a_factor=up_to_a_factor))
