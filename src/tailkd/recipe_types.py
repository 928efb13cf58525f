"""What the sections of a recipe are made of: numbers with bounds, durations, plain values or sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = BeforeValidator(_no_truth_value)
Positive = Annotated[float, Field(gt=0), Number]
NotNegative = Annotated[float, Field(ge=0), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
Part = Annotated[float, Field(gt=0, le=1), Number]
Share = Annotated[float, Field(gt=0, lt=1), Number]
Count = Annotated[int, Field(ge=1), Number]
NonNegative = Annotated[int, Field(ge=0), Number]


def seconds_of(duration: str) -> float:
    """``"11h30m"`` as 41400.0: days, hours, minutes, seconds, in this order, each with its letter."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    total = (
        sum(int(n or 0) * size for n, size in zip(found.groups(), (86_400, 3_600, 60, 1), strict=True)) if found else 0
    )
    if not total:
        raise ValueError(f"{duration!r} is no duration; expected one such as 11h30m, 45m or 90s")
    return float(total)


def _duration(value: Any) -> str:
    seconds_of(str(value))
    return str(value)


Duration = Annotated[str, BeforeValidator(_duration)]


def _either(value: Any) -> str:
    return PLAIN if isinstance(value, int | float | str | None) else MADE_UP


PLAIN, MADE_UP = "(plain)", "(made up)"
Either = Discriminator(_either)
"""Between a plain value and a list or section; its tags are no part of a key."""


def _one_or_several(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


ONE, SEVERAL = "(one)", "(several)"
OneOrSeveral = Discriminator(_one_or_several)
"""Between a section and a list of them; its tags are no part of a key."""

TAGS = (PLAIN, MADE_UP, ONE, SEVERAL)
