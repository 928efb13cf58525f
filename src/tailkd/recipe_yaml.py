"""YAML files -> plain values, `extends` followed, and where each key stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tailkd.errors import Refusal
from tailkd.recipe_merge import Values, merged

MAX_BYTES, MAX_NODES = 1 << 20, 10_000  # a recipe is a page; more is a mistake or an attack
MAX_FILES = 8  # that extend one another

Places = dict[str, str]
"""Dotted key -> "line 7" or "base.yaml, line 7"."""


def load(path: Path) -> tuple[Values, Places]:
    """The values of a recipe file laid over those of the file that it extends, and where each key stands.

    Raises:
        Refusal: a file that cannot be read or is no YAML, files that extend each other in a circle.
    """
    values, lines = _one_file(path)
    return extended(values, {key: f"line {line}" for key, line in lines.items()}, path.parent, (path.resolve(),))


def extended(values: Values, places: Places, folder: Path, above: tuple[Path, ...] = ()) -> tuple[Values, Places]:
    """Values laid over those of the file that their `extends` names, relative to `folder`."""
    _made_absolute(values, folder)
    base = values.pop("extends", None)
    if base is None:
        return values, places
    if not isinstance(base, str):
        raise Refusal(f"extends: expected the path of a recipe file; came {base!r}")
    path = folder / Path(base).expanduser()
    if path.resolve() in above or len(above) >= MAX_FILES:
        chain = " -> ".join(str(p) for p in (*above, path.resolve()))
        raise Refusal(f"extends: recipes that extend one another in a circle, or more than {MAX_FILES} deep: {chain}")
    own, lines = _one_file(path)
    named = {key: f"{base}, line {line}" for key, line in lines.items()}
    own, named = extended(own, named, path.parent, (*above, path.resolve()))
    return merged(own, values), {**named, **places}


def _made_absolute(values: Values, folder: Path) -> None:
    """A recipe that is named by its path is looked for beside the file that names it."""
    training = values.get("training")
    tokens = training.get("tokens") if isinstance(training, dict) else None
    if isinstance(tokens, dict) and isinstance(tokens.get("match_flops"), str):
        tokens["match_flops"] = str((folder / tokens["match_flops"]).absolute())


def yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML()


def _one_file(path: Path) -> tuple[Values, dict[str, int]]:
    """Plain values of one file, and the line of every key."""
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path}: the recipe cannot be read ({error.strerror}); expected a YAML file") from error
    if len(content) > MAX_BYTES:
        raise Refusal(f"{path}: {len(content):,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        loaded = yaml().load(content.decode("utf-8-sig"))
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
    return plain(loaded, lines=lines), lines


def plain(value: Any, *, lines: dict[str, int] | None = None, key: str = "", budget: list[int] | None = None) -> Any:
    """Plain dicts and lists of what ruamel gives, and the line of every key."""
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise Refusal(f"the recipe unfolds to more than {MAX_NODES:,} values; aliases that multiply are not a recipe")
    if isinstance(value, dict):
        values = {}
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            if lines is not None and hasattr(value, "lc"):
                lines[below] = value.lc.key(name)[0] + 1  # type: ignore[attr-defined]
            values[str(name)] = plain(inner, lines=lines, key=below, budget=budget)
        return values
    if isinstance(value, list):
        return [plain(inner, lines=lines, key=f"{key}.{i}", budget=budget) for i, inner in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
