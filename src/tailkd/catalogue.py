"""The paper's experiments as recipes that come with the package: which there are, and copies of them.

A recipe begins with a comment of ``# key: value`` lines, whose long values go on behind ``#   ``. Numbers of the bill
stand there (`tests/recipe_figures.py` writes them), so that the list needs no models and no torch.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tailkd.errors import Refusal

RECIPES = Path(__file__).parent / "recipes"
BASE = "base.yaml"
"""What the other recipes of a folder extend; the only one that is not listed."""

KEYS = ("table", "row", "about", "tokens", "hardware", "hours", "memory", "data", "open")


@dataclass(frozen=True)
class Entry:
    """A recipe and its bill: tokens trained on; GPUs, hours on all of them at the recipe's utilisation, and bytes of
    memory on one that holds everything.
    """

    name: str
    table: str
    row: str
    about: str
    tokens: int
    gpus: int
    hours: float
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def listed() -> list[Entry]:
    """The recipes of the package by name, such as ``pretraining/qwen1.5-1.2b/tad``."""
    return [_entry(path) for path in files() if path.name != BASE]


def files() -> list[Path]:
    """All recipe files of the package, those that others extend too."""
    return sorted(RECIPES.rglob("*.yaml"), key=lambda path: path.with_suffix("").parts)


def copied(name: str, folder: Path) -> list[Path]:
    """Copies a recipe, with the files that it names, into a folder; the paths there, the recipe's first.

    A file that is there already with the same content stays.

    Raises:
        Refusal: no such recipe; a file is there already with other content; a folder that cannot be written.
    """
    sources = _with_named(_found(name))
    targets = [folder / source.name for source in sources]
    try:
        for source, target in zip(sources, targets, strict=True):
            if target.exists() and target.read_bytes() != source.read_bytes():
                raise Refusal(f"{target} is there already and is not the recipe's; give another folder, --to DIR")
        folder.mkdir(parents=True, exist_ok=True)
        for source, target in zip(sources, targets, strict=True):
            target.write_bytes(source.read_bytes())
    except OSError as error:
        raise Refusal(f"{folder}: no recipe can be copied there ({error.strerror}); give a folder, --to DIR") from error
    return targets


def header(path: Path) -> dict[str, str]:
    """The ``# key: value`` lines that a recipe begins with."""
    found: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        if (more := re.fullmatch(r"#   (\S.*)", line)) and found:
            found[list(found)[-1]] += f" {more.group(1)}"
        elif one := re.fullmatch(r"# ([a-z]+): (.+)", line):
            found[one.group(1)] = one.group(2)
        else:
            break
    return found


def _entry(path: Path) -> Entry:
    said = header(path)
    return Entry(
        name=_name(path),
        table=said["table"],
        row=said["row"],
        about=said["about"],
        tokens=int(said["tokens"].replace(",", "")),
        gpus=int(said["hardware"].split()[0]),
        hours=float(said["hours"].split()[0]),
        memory_bytes=round(float(said["memory"].split()[0]) * 1e9),
    )


def _name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def _found(name: str) -> Path:
    known = {_name(path): path for path in files() if path.name != BASE}
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise Refusal(f"no recipe {name!r}; {meant}`tailkd recipes` lists them")


def _with_named(path: Path) -> list[Path]:
    """A recipe, and behind it the files of its folder that it extends or whose FLOPs it matches."""
    found = [path]
    for one in found:
        for name in re.findall(r"\b(?:extends|match_flops): *([^\s},]+)", one.read_text("utf-8")):
            if path.parent / name not in found:
                found.append(path.parent / name)
    return found
