"""What `tailkd measure` shows of models measured alone: a table, and two figures as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailkd.report.figures import draw_log_reliability, draw_tail_mass, drawn
from tailkd.report.record import write_json

ROWS = {
    "tokens": ("tokens", "{:,}"),
    "cross_entropy": ("cross-entropy, nats", "{:.4f}"),
    "perplexity": ("perplexity", "{:,.2f}"),
    "entropy": ("entropy, nats", "{:.4f}"),
    "mismatch_rate": ("mismatch rate", "{:.2%}"),
    "full_ece": ("Full-ECE", "{:.2%}"),
    "ece": ("ECE", "{:.2%}"),
    "log_ece": ("log-binned ECE", "{:.2%}"),
}
AFTER = "mismatch_rate"  # below it the tail masses


def print_models(found: dict[str, Any]) -> None:
    """A column for each model, on standard output."""
    models = found["models"]
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    for key, (title, form) in ROWS.items():
        table.add_row(title, *(form.format(one[key]).replace("%", " %") for one in models.values()))
        if key == AFTER:
            for size in next(iter(models.values()))["tail_mass"]:
                masses = (f"{100 * one['tail_mass'][size]:.2f} %" for one in models.values())
                table.add_row(f"tail mass, K = {size}", *masses)
    Console(highlight=False).print(table)


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """measures.json, and two figures each as SVG and as PNG: tail_mass, calibration. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "measures.json", found)
    models = found["models"]
    shown = {f"{name} ({100 * one['mismatch_rate']:.0f} %)": one for name, one in models.items()}
    files = [folder / "measures.json"]
    title = "Tail mass against K (mismatch rate)"
    files += _figure(folder, "tail_mass", title, lambda axes: draw_tail_mass(axes, shown, "mass outside the top K"))
    tables = {name: one["log_reliability"] for name, one in models.items()}
    files += _figure(
        folder, "calibration", "Calibration of all probabilities", lambda axes: draw_log_reliability(axes, tables)
    )
    return files


def _figure(folder: Path, name: str, title: str, draw: Callable[[Any], None]) -> list[Path]:
    files = []
    with drawn(draw, title) as figure:
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
            path = folder / f"{name}.{kind}"
            temporary = path.with_name(f".{path.name}.tmp")
            figure.savefig(temporary, format=kind, **options)
            temporary.replace(path)
            files.append(path)
    return files
