"""The metadata of a student's card that the hub reads; ids of the hub alone, no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailkd.report.origins import licence
from tailkd.report.record import Run

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text generation"}
MEASURES = {
    "cross_entropy": "cross-entropy, nats per token",
    "kl": "KL(teacher || student), nats per token",
    "head_kl": "its part in the teacher's top-k",
    "tail_kl": "its part in the tail",
    "full_ece": "Full-ECE, a fraction",
    "ece": "ECE, a fraction",
    "top1_agreement": "agreement with the teacher's first choice, a fraction",
    "acceptance": "acceptance in speculative decoding, a fraction",
}
ABSOLUTE = re.compile(r"(?<![\w.:/~-])(?:~|/)[^\s'\",;:=]*/[^\s'\",;:=]*")


def metadata(run: Run) -> str:
    """The YAML between the two lines of dashes."""
    from huggingface_hub import ModelCardData

    models, data = run.origins["models"], run.origins["data"]
    divergence = run.recipe["objective"]["divergence"]
    taught = ["distillation", divergence.replace("_", "-")] if run.recipe.get("teacher") else []
    return ModelCardData(
        **_base(run.recipe["student"], models),
        **licence(models),
        language=_language(models),
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=_datasets(models, data),
        tags=["tailkd", *taught],
        model_name=run.name,
        eval_results=[*_heldout(run), *_tasks(run)],
    ).to_yaml()


def _base(student: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """What the student was made from, where the hub knows it: its start, else the teacher, else what their cards name.

    One id alone: the hub calls a model of several bases a merge.
    """
    role = "student" if "student" in models else "teacher"
    if role in models and models[role]["hub"]:
        return {"base_model": models[role]["hub"], "base_model_relation": "finetune"}
    for one in (models.get("student"), models.get("teacher")):
        named = one and (one["hub"] or one["card"].get("base_model"))
        if isinstance(named, str):
            return {"base_model": named}
    return {}


def _language(models: dict[str, Any]) -> Any:
    return next((one["card"]["language"] for one in models.values() if "language" in one["card"]), None)


def _datasets(models: dict[str, Any], data: list[dict[str, Any]]) -> list[str] | None:
    """Those trained on, by an earlier stage too."""
    before = models.get("student", {"hub": None, "card": {}})
    earlier = [] if before["hub"] else before["card"].get("datasets", [])
    found = [*([earlier] if isinstance(earlier, str) else earlier), *(one["hub"] for one in data if one["hub"])]
    return list(dict.fromkeys(found)) or None


def _heldout(run: Run) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    measures, first = run.evaluation["student"], run.origins["data"][0]
    heldout = run.recipe["data"]["heldout"]
    own = heldout["hub"] or heldout["path"]
    return [
        EvalResult(
            **TASK,
            dataset_type=first["hub"] if not own and first["hub"] else "held-out",
            dataset_name="held-out documents" if own else f"held-out documents of {first['name']}",
            metric_type=measure,
            metric_name=title,
            metric_value=measures[measure],
            metric_args={"tokens": measures["tokens"], "command": "tailkd distill recipe.yaml"},
        )
        for measure, title in MEASURES.items()
        if measures.get(measure) is not None
    ]


def without_folders(text: str) -> str:
    """Absolute paths by their last part: others need not know where a file lay."""
    return ABSOLUTE.sub(lambda found: Path(found.group()).name, text)


def _tasks(run: Run) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            **TASK,
            dataset_type=one["task"],
            dataset_name=one["task"],
            metric_type=one["metric"],
            metric_name=f"{one['metric']}, {one['shots']} shots",
            metric_value=one["value"],
            metric_args={
                "num_few_shot": one["shots"],
                "items": one["items"],
                "standard_error": one["error"],
                "command": without_folders(one["command"]),
            },
        )
        for one in run.tasks
    ]
