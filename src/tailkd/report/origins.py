"""Where models and corpora come from, by their own cards: ids, commits, licences."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

ID = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?", re.ASCII)
OWNED = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
FRONT = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
INHERITED = ("license", "license_name", "license_link", "language", "base_model", "datasets")
SAYS_NOTHING = ("unknown", None)


def origins(recipe: dict[str, Any], *, fetch: bool = False) -> dict[str, Any]:
    """``{"models": {role: origin}, "data": [origin, ...]}`` of a resolved recipe.

    An origin has the name to tell (of a folder its own, without those above), `hub` (its id, None for a folder), the
    revision asked for, the commit, and what its card says of `INHERITED`.

    Args:
        fetch: get from the hub the cards of what was loaded from there, and go without where that fails; otherwise
            only the hub's cache is looked at, and no connection is opened.
    """
    teachers, student, data = recipe.get("teacher") or [], recipe["student"], recipe["data"]
    several = isinstance(teachers, list)
    roles = {f"teacher.{n}": one for n, one in enumerate(teachers)} if several else {"teacher": teachers}
    if student.get("run"):
        roles["student"] = {"model": str(Path(student["run"]) / "student")}
    elif student.get("model"):
        roles["student"] = student
    train = data["train"] if isinstance(data["train"], list) else [data["train"]]
    models = {
        role: _model(one["model"], one.get("revision"), one.get("gguf_file"), fetch)
        if one.get("model")
        else _local(one["cache"])
        for role, one in roles.items()
        if one.get("model") or one.get("cache")
    }
    return {"models": models, "data": [_corpus(one, fetch) for one in train]}


def _model(name: str, revision: str | None, gguf_file: str | None, fetch: bool) -> dict[str, Any]:
    """A model that was loaded from the hub lies in its cache; any other name is a folder's, there or not."""
    loaded = None if _is_path(name) else _cached(name, gguf_file or "config.json", revision, "model")
    if loaded is None:
        return _local(name)
    commit = loaded.parent.name
    return _on_hub(name, revision, commit, _card_on_hub(name, commit, "model", fetch))


def _corpus(source: dict[str, Any], fetch: bool) -> dict[str, Any]:
    name, revision = source["hub"] or source["path"], source.get("revision")
    if not source["hub"] or _is_path(name):
        return _local(name)
    card = _card_on_hub(name, revision, "dataset", fetch)
    return _on_hub(name, revision, card.parent.name if card else None, card)


def _is_path(name: str) -> bool:
    return not ID.fullmatch(name) or Path(name).expanduser().exists()


def _local(name: str) -> dict[str, Any]:
    card = _card_in(Path(name).expanduser())
    return {"name": shown(name), "hub": None, "revision": None, "commit": None, "card": card}


def _on_hub(name: str, revision: str | None, commit: str | None, card: Path | None) -> dict[str, Any]:
    said = _front_matter(card) if card else {}
    return {"name": name, "hub": name, "revision": revision, "commit": commit, "card": said}


def _card_on_hub(name: str, revision: str | None, kind: str, fetch: bool) -> Path | None:
    card = _cached(name, "README.md", revision, kind)
    if card is None and fetch:
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # whatever the connection raises: no run ends because a card cannot be had
            return Path(hf_hub_download(name, "README.md", revision=revision, repo_type=kind))
    return card


def shown(name: str) -> str:
    """How a name is told to others: of a path the last part, of a run's student also which run."""
    folder = Path(name)
    if folder.name == "student" and (folder.parent / "recipe.yaml").is_file():
        return f"the student of the run {folder.parent.absolute().name}"
    return folder.name or name


def _cached(name: str, file: str, revision: str | None, kind: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _card_in(folder: Path) -> dict[str, Any]:
    card, config = folder / "README.md", folder / "config.json"
    said = _front_matter(card) if card.is_file() else {}
    if "license" not in said and config.is_file():
        with suppress(ValueError):
            said |= _kept(json.loads(config.read_text("utf-8")), ("license",))
    return said


def _front_matter(card: Path) -> dict[str, Any]:
    """What a card's metadata say of `INHERITED`; nothing where they cannot be read."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found = FRONT.match(card.read_text("utf-8", errors="replace"))
    try:
        values = YAML(typ="safe").load(found.group(1)) if found else {}
    except YAMLError:
        return {}
    return _kept(values, INHERITED)


def _ids(name: str, values: list[Any]) -> list[Any]:
    """Of ids on the hub those that are some: trainers write paths in their place, too."""
    form = {"base_model": OWNED, "datasets": ID}.get(name)
    return [one for one in values if form is None or form.fullmatch(str(one))]


def _kept(values: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Strings and lists of strings alone; a list of one is that one."""
    kept = {}
    for name in names if isinstance(values, dict) else ():
        found = values.get(name)
        listed = _ids(name, [found] if isinstance(found, str) else found if isinstance(found, list) else [])
        if listed and all(isinstance(one, str) for one in listed):
            kept[name] = listed if len(listed) > 1 else listed[0]
    return kept


def licence(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Metadata of the licence that a student inherits: that of its models where they agree.

    ``license: unknown`` where no card says anything; ``license: other`` with the names of all where they differ.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in models.values():
        found |= {told["license_name"] or told["license"]: told for told in licences(one)}
    if not found:
        return {"license": "unknown"}
    if len(found) == 1:
        (only,) = found.values()
        return {key: value for key, value in only.items() if value}
    return {"license": "other", "license_name": "-and-".join(sorted(found))}


def licences(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that the model's card names: mostly one."""
    card = model["card"]
    said = card.get("license")
    names = said if isinstance(said, list) else [said]
    own = {"license_name": card.get("license_name"), "license_link": _address(model, card.get("license_link"))}
    plain = {"license_name": None, "license_link": None}
    return [{"license": one, **(own if one == "other" else plain)} for one in names if one not in SAYS_NOTHING]


def _address(model: dict[str, Any], link: Any) -> str | None:
    """A link that holds elsewhere too: a file's in the model's own repository becomes an address on the hub."""
    if not isinstance(link, str) or link.startswith(("http://", "https://")):
        return link if isinstance(link, str) else None
    return f"https://huggingface.co/{model['hub']}/blob/{model['commit'] or 'main'}/{link}" if model["hub"] else None
