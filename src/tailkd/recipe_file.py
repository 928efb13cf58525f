"""Recipes from YAML and back; all errors at once, each with its line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tailkd.errors import Refusal
from tailkd.recipe import RULES, Recipe, Section
from tailkd.secrets import masked

MAX_BYTES, MAX_NODES = 1 << 20, 10_000  # a recipe is a page; more is a mistake or an attack


class Problem:
    """One thing wrong with a recipe, at a dotted key."""

    def __init__(self, key: str, message: str) -> None:
        self.key, self.message = key, message


class RecipeRefusal(Refusal):
    """All that is wrong with one recipe."""

    def __init__(self, name: str, problems: list[Problem], lines: dict[str, int]) -> None:
        listed = [f"  {_place(name, p.key, lines)}{p.key or 'recipe'}: {p.message}" for p in problems]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{name}: {count} in the recipe, nothing was started\n" + "\n".join(listed))
        self.problems = problems


def read(recipe: str | Path | dict[str, Any], overrides: dict[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML file or a dict, with dotted overrides such as ``{"training.seed": 4}``.

    Raises:
        RecipeRefusal: listing every problem with line, key, what came and what was expected.
    """
    if isinstance(recipe, dict):
        name, values, lines = "recipe", _plain(recipe), {}
    else:
        name = str(recipe)
        values, lines = _load(Path(recipe))
    for key, value in (overrides or {}).items():
        _override(values, key, value)
        lines[key] = 0
    checked = _typed(name, values, lines)
    problems = [Problem(key, message) for rule in RULES for key, message in rule(checked)]
    if problems:
        raise RecipeRefusal(name, problems, lines)
    return checked


def read_saved(path: Path) -> Recipe:
    """The recipe in a run folder, as it was written there: what it names may be gone, or masked."""
    return _typed(str(path), *_load(path))


def _typed(name: str, values: dict[str, Any], lines: dict[str, int]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
        raise RecipeRefusal(name, problems, lines) from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["training.seed=4", "out=elsewhere"]`` as ``{"training.seed": 4, "out": "elsewhere"}``."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise Refusal(f"override {argument!r} is not of the form key=value, such as training.seed=4")
        overrides[key] = _yaml().load(value) if value else None
    return overrides


SCHEMA = "recipe.schema.json"
HEADER = f"# yaml-language-server: $schema={SCHEMA}"
"""First line of a recipe, by which editors find the schema that `tailkd schema` writes beside it."""


def schema() -> dict[str, Any]:
    """JSON schema of a recipe: every key with its type, default and meaning."""
    return Recipe.model_json_schema() | {"title": "tailkd recipe"}


def write(recipe: Recipe, path: Path) -> None:
    """The resolved recipe as YAML, readable again; secrets in it are masked."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{HEADER}\n")
        _yaml().dump(masked(recipe.resolved()), file)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML()


def _load(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path}: the recipe cannot be read ({error.strerror}); expected a YAML file") from error
    if len(content) > MAX_BYTES:
        raise Refusal(f"{path}: {len(content):,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        loaded = _yaml().load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise Refusal(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the recipe as UTF-8"
        ) from error
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        key = re.search(r'duplicate key "(.*?)"', str(error.problem))
        raise Refusal(
            f"{path}:{line}: the key {key.group(1) if key else '?'!r} stands here a second time; keep one"
        ) from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise Refusal(f"{path}:{line}: not YAML: {error.problem}") from error
    except (YAMLError, RecursionError, ValueError) as error:
        raise Refusal(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        kind = "nothing" if loaded is None else type(loaded).__name__
        raise Refusal(f"{path}: expected keys such as teacher, student, data and training; the file holds {kind}")
    lines: dict[str, int] = {}
    return _plain(loaded, lines=lines), lines


def _plain(value: Any, *, lines: dict[str, int] | None = None, key: str = "", budget: list[int] | None = None) -> Any:
    """Plain dicts and lists of what ruamel gives, and the line of every key."""
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise Refusal(f"the recipe unfolds to more than {MAX_NODES:,} values; aliases that multiply are not a recipe")
    if isinstance(value, dict):
        plain = {}
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            if lines is not None and hasattr(value, "lc"):
                lines[below] = value.lc.key(name)[0] + 1  # type: ignore[attr-defined]
            plain[str(name)] = _plain(inner, lines=lines, key=below, budget=budget)
        return plain
    if isinstance(value, list):
        return [_plain(inner, lines=lines, key=f"{key}.{i}", budget=budget) for i, inner in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = _plain(value)


def _place(name: str, key: str, lines: dict[str, int]) -> str:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    line = lines.get(key)
    if line is None:
        return ""
    return f"line {line}: " if line else "override: "


def _problem(error: Any) -> Problem:
    location = [str(part) for part in error["loc"]]
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
    for name in location:
        annotation = section.model_fields[name].annotation
        section = next(
            t
            for t in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, Section)
        )
    return list(section.model_fields)
