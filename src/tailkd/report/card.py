"""The student folder's README: its model card, as the hub and people read it."""

from __future__ import annotations

import io
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from tailkd.report.compare import COLUMNS, TESTED, cost, lines
from tailkd.report.metadata import metadata, without_folders
from tailkd.report.origins import licence, licences
from tailkd.report.readme import start
from tailkd.report.record import Run
from tailkd.report.uncertainty import over_rows
from tailkd.secrets import without_secrets

NONE_TOLD = "none told"
STAGES = {
    "student_step": "student",
    "teacher_forward": "teacher",
    "selection": "selection of data",
    "generation": "generated text",
}


def write_card(run: Run) -> Path:
    """README.md in the student's folder, written aside and then renamed."""
    path = run.student / "README.md"
    temporary = path.with_name(".README.md.tmp")
    temporary.write_text(card(run), encoding="utf-8")
    return temporary.replace(path)


def card(run: Run, place: str | None = None) -> str:
    """The model card of a finished run's student, with metadata that `huggingface_hub.ModelCard.load` reads.

    Args:
        place: the id on the hub under which it will be loaded; None for a folder.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string(resources.files("tailkd.report").joinpath("card.md").read_text("utf-8"))
    return without_secrets(template.render(_made(run), **_reached(run), **_loaded(run, place)))


def _made(run: Run) -> dict[str, Any]:
    recipe, models, spent = run.recipe, run.origins["models"], cost(run)
    return {
        "metadata": metadata(run),
        "name": run.name,
        "taught": bool(recipe.get("teacher")),
        "opening": _opening(run),
        "start": start(recipe["student"], models.get("student", {}).get("name")),
        "models": _models(run),
        "licence": _licence(models),
        "sources": _sources(run),
        "heldout": run.data["heldout"],
        "skipped": sum(run.data["skipped"].values()),
        "objective": ", ".join(f"{key} {value}" for key, value in recipe["objective"].items() if value is not None),
        "training": recipe["training"],
        "batch_size": recipe["training"]["batch_size"],
        "context": recipe["data"]["context"],
        "steps": max(record["step"] for record in run.metrics),
        "cost": spent,
        "hours": f"{spent.seconds / 3600:.3g}",
        "flops": _flops(run, spent.tokens),
        "hardware": f"{run.environment['device']}, {run.environment['threads']} threads",
        "recipe": _recipe(recipe),
        "versions": run.environment["versions"],
        "python": run.environment["python"],
    }


def _reached(run: Run) -> dict[str, Any]:
    return {
        "columns": {key: title.replace("|", "\\|") for key, title in COLUMNS.items()},
        "lines": lines([run]),
        "measured": run.evaluation["student"]["tokens"],
        "by_source": "sources" in run.evaluation["student"],
        "intervals": _intervals(run),
        "tasks": run.tasks,
        "commands": list(dict.fromkeys(without_folders(one["command"]) for one in run.tasks)),
    }


def _loaded(run: Run, place: str | None) -> dict[str, Any]:
    config = json.loads((run.student / "config.json").read_text("utf-8"))
    return {
        "architecture": (config.get("architectures") or [config["model_type"]])[0],
        "on_hub": place is not None,
        "place": place or "student",
        "file": re.sub(r"[^\w.-]+", "-", (place or run.name).rpartition("/")[2]),
    }


def _opening(run: Run) -> str:
    found, models = run.recipe.get("teacher"), run.origins["models"]
    if not found:
        return "A language model trained without a teacher"
    if isinstance(found, dict):
        return f"A student of {_linked(models['teacher'])}"
    total = sum(one["weight"] for one in found)
    shares = (f"{100 * one['weight'] / total:.3g} % {_linked(models[f'teacher.{n}'])}" for n, one in enumerate(found))
    return f"A student of the mixture of {' and '.join(shares)}"


def _models(run: Run) -> list[dict[str, str]]:
    """Teachers, what the student started from, and the student itself."""
    rows = [
        {
            "role": "start" if role == "student" else role.replace(".", " "),
            "name": _linked(one),
            "revision": _revision(one),
            "parameters": _parameters(run, role),
            "licence": _told(one),
        }
        for role, one in run.origins["models"].items()
    ]
    own = {"role": "this student", "name": _cell(run.name), "revision": "", "licence": "as below"}
    return [*rows, {**own, "parameters": _parameters(run, "student")}]


def _parameters(run: Run, role: str) -> str:
    found, (side, _, place) = run.bill, role.partition(".")
    if found is None or side not in found["parameters"]:  # read from its cache alone
        return "–"
    counted = found["parameters"][side]
    return f"{(counted[int(place)] if place else counted)['total']:,}"


def _revision(one: dict[str, Any]) -> str:
    commit = "" if one["commit"] in (None, one["revision"]) else f"(`{one['commit']}`)"
    return " ".join(filter(None, (one["revision"], commit))) or "–"


def _linked(one: dict[str, Any], *, kind: str = "") -> str:
    return f"[{one['hub']}](https://huggingface.co/{kind}{one['hub']})" if one["hub"] else f"`{_cell(one['name'])}`"


def _told(one: dict[str, Any]) -> str:
    names = [told["license_name"] or told["license"] for told in licences(one)]
    return _cell(", ".join(names)) or NONE_TOLD


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licence(models: dict[str, Any]) -> str:
    """What follows for the student, in a sentence."""
    found = licence(models)
    if found["license"] == "unknown":
        return (
            "No card beside these models names a licence, so this one says `unknown`: find out what they allow before "
            "you share what was made from them."
        )
    if len(set(map(_told, models.values())) - {NONE_TOLD}) > 1:
        return "Their licences differ, and the student may fall under each of them: look at all before you share it."
    return f"The student inherits `{found.get('license_name', found['license'])}`; look at what it asks of copies."


def _sources(run: Run) -> list[dict[str, str]]:
    """Rows of the corpora, with the student's held-out measures of each where there are several."""
    counted = run.data.get("sources", {"": run.data["train"]})
    measured = run.evaluation["student"].get("sources", {})
    found = []
    for one, (name, count) in zip(run.origins["data"], counted.items(), strict=True):
        row = {
            "name": _linked(one, kind="datasets/") + (f" {_revision(one)}" if one["hub"] else ""),
            "documents": f"{count['documents']:,}",
            "tokens": f"{count['tokens']:,}",
            "epochs": f"{count['epochs']:.3g}" if "epochs" in count else "–",
            "licence": _told(one),
        }
        for measure in ("cross_entropy", "kl"):
            value = measured.get(name, {}).get(measure)
            row[measure] = "–" if value is None else f"{value:.4f}"
        found.append(row)
    return found


def _intervals(run: Run) -> list[str]:
    """What the held-out sample's size leaves open of the measures with sums per row."""
    rows, measures = run.heldout["student"]["rows"], run.evaluation["student"]
    found = {name: over_rows(rows[name], rows["tokens"]) for name in TESTED if rows.get(name)}
    told = (f"{COLUMNS[name]} {measures[name]:.4f} {one}" for name, one in found.items() if one is not None)
    sentence = "; ".join(told)
    return [f"Over {len(rows['tokens']):,} held-out rows, 95 %: {sentence}."] if sentence else []


def _flops(run: Run, tokens: int) -> dict[str, str] | None:
    if run.bill is None:
        return None
    rates = run.bill["pflop_per_million_tokens"]
    spent = {stage: f"{rates[stage] * 1e15 / 1e6 * tokens:.3g}" for stage in (*STAGES, "total") if rates[stage]}
    parts = [f"{name} {spent[stage]}" for stage, name in STAGES.items() if stage in spent]
    return {"total": spent["total"], "parts": ", ".join(parts)}


def _recipe(recipe: dict[str, Any]) -> str:
    """The resolved recipe as YAML, without where it lay on this machine."""
    from ruamel.yaml import YAML

    yaml, text = YAML(), io.StringIO()
    yaml.dump(_without_folders(recipe), text)
    return text.getvalue().rstrip()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return without_folders(value) if isinstance(value, str) else value
