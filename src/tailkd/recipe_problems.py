"""What is wrong with a recipe, in words: key, place, what came, what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from tailkd.errors import Refusal
from tailkd.recipe import Recipe
from tailkd.recipe_types import TAGS, Section


class Problem:
    """One thing wrong with a recipe, at a dotted key."""

    def __init__(self, key: str, message: str) -> None:
        self.key, self.message = key, message


class RecipeRefusal(Refusal):
    """All that is wrong with one recipe; `partial` is the recipe without it, where the rest makes one."""

    def __init__(
        self, name: str, problems: list[Problem], places: dict[str, str], partial: Recipe | None = None
    ) -> None:
        listed = [f"  {_place(p.key, places)}{p.key or 'recipe'}: {p.message}" for p in problems]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{name}: {count} in the recipe, nothing was started\n" + "\n".join(listed))
        self.name, self.problems, self.places, self.partial = name, problems, places, partial


def _place(key: str, places: dict[str, str]) -> str:
    while key and key not in places:
        key = key.rpartition(".")[0]
    return f"{places[key]}: " if key else ""


def problem_of(error: Any) -> Problem:
    """One of pydantic's errors in our words."""
    location = [str(part) for part in error["loc"] if part not in TAGS]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return Problem(key, f"unknown key; {hint}")
    if error["type"] == "missing":
        return Problem(key, "is required and missing")
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").split(", unable")[0]
    came = repr(error["input"])
    expected = expected if expected.startswith("expected") else f"expected {expected}"
    return Problem(key, f"{expected}; came {came if len(came) <= 60 else came[:57] + '...'}{_nearest(error)}")


def _nearest(error: Any) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
    close = difflib.get_close_matches(error["input"], choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields(location: list[str]) -> list[str]:
    section: Any = Recipe
    for name, below in zip(location, [*location, ""][1:], strict=True):
        if not name.isdigit():  # of a list, which comes behind the single section that it may stand for
            found = list(_sections(section.model_fields[name].annotation))
            section = found[-1 if below.isdigit() else 0]
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)
