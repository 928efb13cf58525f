"""`extends` and overrides: one mapping laid over another, key by key."""

from __future__ import annotations

from typing import Any

from tailkd.recipe import READERS

ALTERNATIVES = (
    ("student", ("model", "from_teacher", "run")),
    ("teacher", ("model", "config")),
    ("training", ("tokens", "epochs", "flops", "hours")),
    ("data.train", ("path", "hub")),
    ("data.heldout", ("path", "hub", "fraction")),
    *(
        (section, ("text", one, "messages"))
        for section in ("data.train", "data.heldout")
        for one in ("prompt", "completion", "template")
    ),
)
"""Keys of a section of which one is given: a new one takes the place of the one below."""

Values = dict[str, Any]


def merged(base: Values, over: Values) -> Values:
    """`over` laid upon `base`: sections key by key, anything else replaced; neither argument changes.

    An alternative (`ALTERNATIVES`) that `over` gives drops the other ones of `base`, and another divergence those
    keys of `base` that it does not read, so that a baseline needs no lines that take something back.
    """
    base = _without_replaced(base, over)
    return _laid(base, over)


def _laid(base: Values, over: Values) -> Values:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _laid(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _without_replaced(base: Values, over: Values) -> Values:
    for section, names in ALTERNATIVES:
        given = [name for name in names if _at(over, section).get(name) is not None]
        if given:
            base = _without(base, section, [name for name in names if name not in given])
    divergence = _at(over, "objective").get("divergence")
    if divergence is not None:
        base = _without(base, "objective", [key for key, readers in READERS.items() if divergence not in readers])
    return base


def _at(values: Values, section: str) -> Values:
    found: Any = values
    for name in section.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _without(values: Values, section: str, names: list[str]) -> Values:
    name, _, rest = section.partition(".")
    inner = values.get(name)
    if not isinstance(inner, dict):
        return values
    kept = _without(inner, rest, names) if rest else {key: value for key, value in inner.items() if key not in names}
    return {**values, name: kept}
