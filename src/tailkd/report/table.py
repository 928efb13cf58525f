"""The table of runs on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailkd.report.compare import COLUMNS, lines
from tailkd.report.record import Run
from tailkd.report.verdicts import Comparison, sentences

WIDE = 110
NARROW_COLUMNS = ("cross_entropy", "kl", "head_kl", "tail_kl", "full_ece")


def print_table(runs: Sequence[Run]) -> None:
    """Held-out measures of every model on standard output; of several seeds the means."""
    console = Console(highlight=False)
    columns = COLUMNS if console.width >= WIDE else {name: COLUMNS[name] for name in NARROW_COLUMNS}
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines(runs):
        table.add_row(line.name, *(line.cell(column) for column in columns))
    console.print(table)


def print_comparison(comparison: Comparison) -> None:
    """Each place as a table of measures and methods, then in words which differences are noise."""
    console = Console(highlight=False)
    for section in comparison.sections:
        table = Table("", box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
        table.title = Text(f"{section.title}, less {comparison.baseline}")
        table.columns[0].overflow = "fold"
        for name in ("value", "difference", "95 %"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for title, rows in groupby(section.rows, lambda row: row.measure.title):
            table.add_row(Text(title), style="bold")
            for row in rows:
                verdict = "" if row.difference is None else row.verdict
                cells = (f"  {row.group.name}", row.value, row.gap, row.interval, verdict)
                table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        _print_lines(console, [*section.notes, ""])
    _print_lines(console, [*comparison.notes, *sentences(comparison)])


def _print_lines(console: Console, told: Sequence[str]) -> None:
    for line in told:
        console.print(Text(line), soft_wrap=True)


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """``[{"name", "folder", "evaluation"}]``."""
    return [{"name": run.name, "folder": str(run.folder), "evaluation": run.evaluation} for run in runs]


def print_columns(texts: dict[str, str]) -> None:
    """Texts side by side, each under its name."""
    table = Table(*(name.replace("_", " ") for name in texts), show_lines=False, expand=True)
    for column in table.columns:
        column.ratio = 1
    table.add_row(*(Text(text) for text in texts.values()))
    Console(highlight=False).print(table)


def print_tree(values: dict[str, Any]) -> None:
    """Nested values as two columns, the key of each section once."""
    table = Table("", "", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.columns[0].no_wrap = True
    for key, value in _leaves(values):
        table.add_row(key, _cell(key, value), style="bold" if value is None and key.endswith(":") else None)
    Console(highlight=False).print(table)


def _leaves(values: dict[str, Any], indent: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = indent + key.replace("_", " ")
        if isinstance(value, dict) and value:
            yield f"{name}:", None
            yield from _leaves(value, indent + "  ")
        elif isinstance(value, list) and value:
            yield f"{name}:", None
            yield from ((f"{indent}  {number}", one) for number, one in enumerate(value, 1))
        else:
            yield name, value


def _cell(key: str, value: Any) -> Text:
    if value is None or value == {} or value == []:
        return Text("" if key.endswith(":") else "–")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}")
    return Text(f"{value:,.4g}" if isinstance(value, float) else str(value))
