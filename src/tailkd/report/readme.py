"""The run folder's README: what this run is; the student's card lies in its own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailkd.report.compare import COLUMNS, lines
from tailkd.report.record import Run


def write_readme(run: Run) -> Path:
    """README.md in the run folder."""
    recipe = run.recipe
    objective = ", ".join(f"{key} {value}" for key, value in recipe["objective"].items())
    header = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = [f"| {line.name} | " + " | ".join(line.cell(c) for c in COLUMNS) + " |" for line in lines([run])]
    text = [
        f"# {run.name}",
        "",
        f"A student of {run.taught_by}, {start(recipe['student'])}, "
        f"distilled with tailkd {run.environment['versions']['tailkd']}.",
        "",
        f"- corpus: {_corpora(recipe['data']['train'])}",
        f"- objective: {objective}",
        f"- tokens: {recipe['training']['tokens']:,} (rows of {recipe['data']['context']}, batch of "
        f"{recipe['training']['batch_size']})",
        "- load it: `AutoModelForCausalLM.from_pretrained('student')`",
        "- its model card: [student/README.md](student/README.md)",
        "- make it again: `tailkd distill recipe.yaml out=elsewhere`",
        "",
        "Held-out measures (nats per token, percent):",
        "",
        *header,
        *rows,
        "",
        *_by_source(run.evaluation["student"]),
    ]
    path = run.folder / "README.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def _corpora(train: dict[str, Any] | list[dict[str, Any]]) -> str:
    sources = train if isinstance(train, list) else [train]
    return ", ".join(f"`{source['path'] or source['hub']}`" for source in sources)


def _by_source(student: dict[str, Any]) -> list[str]:
    """The student's measures of each source, where there are several."""
    sources = student.get("sources", {})
    if not sources:
        return []
    rows = [
        f"| {name} | {one['tokens']:,} | {one['cross_entropy']:.4f} | "
        f"{'–' if one['kl'] is None else format(one['kl'], '.4f')} |"
        for name, one in sources.items()
    ]
    return [
        "The student's by source:",
        "",
        "| | held-out tokens | cross-entropy | KL |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def start(student: dict[str, Any], name: str | None = None) -> str:
    """What the student was before: `name` is how its model is told."""
    made = student.get("from_teacher")
    if name and not made:
        return f"started from `{name}`"
    if student.get("run"):
        return f"started from the student of the run `{student['run']}`"
    if not made:
        return f"started from `{student['model']}`"
    changed = {"layers", "hidden_size", "intermediate_size", "head_dim", "kv_heads", "attention", "mlp", "embeddings"}
    sizes = ", ".join(f"{key} {value}" for key, value in made.items() if key in changed and value is not None)
    return f"cut out of it ({sizes})"
