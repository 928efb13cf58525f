"""The table of runs on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tailkd.report.compare import COLUMNS, lines
from tailkd.report.record import Run

WIDE = 110
NARROW_COLUMNS = ("cross_entropy", "kl", "head_kl", "tail_kl", "full_ece")


def print_table(runs: Sequence[Run]) -> None:
    """Held-out measures of every model on standard output."""
    console = Console(highlight=False)
    columns = COLUMNS if console.width >= WIDE else {name: COLUMNS[name] for name in NARROW_COLUMNS}
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines(runs):
        table.add_row(line.name, *(line.cell(column) for column in columns))
    console.print(table)


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """``[{"name", "folder", "evaluation"}]``."""
    return [{"name": run.name, "folder": str(run.folder), "evaluation": run.evaluation} for run in runs]
