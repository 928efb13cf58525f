"""Recipes from YAML and back; all errors at once, each with its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tailkd.errors import Refusal
from tailkd.recipe import Recipe
from tailkd.recipe_merge import Values, merged
from tailkd.recipe_problems import Problem, RecipeRefusal, problem_of
from tailkd.recipe_rules import FILES, RULES
from tailkd.recipe_types import TAGS
from tailkd.recipe_yaml import extended, load, plain, yaml
from tailkd.secrets import masked

Rule = Callable[[Recipe], list[tuple[str, str]]]


def read(
    recipe: str | Path | dict[str, Any],
    overrides: dict[str, Any] | None = None,
    *,
    files: bool | Sequence[Rule] = True,
) -> Recipe:
    """A checked recipe from a YAML file or a dict, with dotted overrides such as ``{"training.seed": 4}``.

    `files`: whether corpora and model folders must be there; or rules of what must.

    Raises:
        RecipeRefusal: listing every problem with line, key, what came and what was expected.
    """
    if isinstance(recipe, dict):
        name, (values, places) = "recipe", extended(plain(recipe), {}, Path.cwd())
    else:
        name, (values, places) = str(recipe), load(Path(recipe))
    over: Values = {}
    for key, value in (overrides or {}).items():
        _set(over, key, plain(value))
        places[key] = "override"
    checked, problems = _validated(merged(values, over))
    if checked is not None:
        rules = (*RULES, *(FILES if files is True else files or ()))
        problems += [Problem(key, message) for rule in rules for key, message in rule(checked)]
    if problems or checked is None:
        raise RecipeRefusal(name, problems, places, checked)
    return checked


def read_saved(path: Path) -> Recipe:
    """The recipe in a run folder, as it was written there: what it names may be gone, or masked."""
    values, places = load(path)
    checked, problems = _validated(values)
    if problems or checked is None:
        raise RecipeRefusal(str(path), problems, places, checked)
    return checked


def _validated(values: Values) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, and what is wrong with its keys; unknown ones are left out and the rest is looked at."""
    problems: list[Problem] = []
    while True:
        try:
            return Recipe.model_validate(values), problems
        except ValidationError as error:
            found = error.errors()
            problems += [problem_of(e) for e in found]
            unknown = [e["loc"] for e in found if e["type"] == "extra_forbidden"]
            if len(unknown) < len(found):
                return None, problems
            for location in unknown:
                values = _dropped(values, [str(part) for part in location])


def _dropped(values: Any, location: list[str]) -> Any:
    if len(location) > 1 and location[0] in TAGS:
        return _dropped(values, location[1:])
    name, *rest = location
    if isinstance(values, list):
        return [_dropped(one, rest) if name == str(place) else one for place, one in enumerate(values)]
    if not rest:
        return {key: value for key, value in values.items() if key != name}
    return {**values, name: _dropped(values[name], rest)}


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["training.seed=4", "out=elsewhere"]`` as ``{"training.seed": 4, "out": "elsewhere"}``."""
    from ruamel.yaml.error import YAMLError

    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise Refusal(f"override {argument!r} is not of the form key=value, such as training.seed=4")
        try:
            overrides[key] = yaml().load(value) if value else None
        except YAMLError as error:
            raise Refusal(
                f"override {argument!r}: {value!r} is not a value in YAML, such as 4, text or [0.9, 0.95]"
            ) from error
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
        yaml().dump(masked(recipe.resolved()), file)


def _set(values: Values, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value
