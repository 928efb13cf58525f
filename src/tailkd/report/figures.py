"""Charts as SVG text, narrow enough to stay readable on a phone; colours of axes and text follow the page."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tailkd.report.curves import AXES, SIZES, curve
from tailkd.report.groups import Group, grouped
from tailkd.report.record import Run

COLOURS = ("#2a78d6", "#c2571a", "#1a8f5c", "#a24fc4", "#d0417e", "#8a7a00", "#3c8f9e", "#7d6a58")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
INK = "#010203"  # replaced by currentColor
LEAST_IN_A_BIN = 30
SIZE = (4.0, 2.9)  # inches; 384 CSS pixels wide


@dataclass(frozen=True)
class Chart:
    """A drawing, its title, what it shows in words; a sentence below it for all to see.

    axis: what lies on the x axis of a curve over training; "" for any other chart.
    """

    title: str
    svg: str
    words: str
    note: str = ""
    axis: str = ""


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Every chart these runs have data for.

    Curves are of every run, over tokens alone where there is one run, whose FLOPs go with them. The others are of the
    first seed of each method.
    """
    groups = grouped(runs)
    axes = [axis for axis in AXES if len(groups) > 1 or axis == "tokens"]
    firsts = [group.runs[0] for group in groups]
    drawn = [
        *(_curves(groups, axis, measure) for axis in axes for measure in CURVES),
        _tail_mass(firsts),
        _reliability(firsts),
        _log_reliability(firsts),
    ]
    return [chart for chart in drawn if chart is not None]


CURVES = {
    "kl": "Held-out KL(T||S)",
    "cross_entropy": "Held-out cross-entropy",
    "head_kl": "Head part of the held-out KL",
    "tail_kl": "Tail part of the held-out KL",
}
Points = list[tuple[float, float]]


def _curves(groups: Sequence[Group], axis: str, measure: str) -> Chart | None:
    """Every run's curve, those of one method in one colour."""
    series = {group.label: _series(group, axis, measure) for group in groups}
    series = {label: curves for label, curves in series.items() if curves}
    if not series:
        return None
    longest = max(curve[-1][0] for curves in series.values() for curve in curves)
    size, unit = _unit(axis, longest)

    def draw(axes: Any) -> None:
        for number, (label, each) in enumerate(series.items()):
            for place, points in enumerate(each):
                x, y = zip(*points, strict=True)
                label_once = {} if place else {"label": label}
                axes.plot([value / size for value in x], y, **label_once, **_style(number))
        teacher = groups[0].runs[0].evaluation["teacher"]
        if measure == "cross_entropy" and teacher is not None:
            axes.axhline(teacher[measure], color=INK, linewidth=0.8)
            axes.annotate("teacher", (0, teacher[measure]), fontsize=8, color=INK, va="bottom")
        elif measure != "cross_entropy":
            axes.set_ylim(bottom=0)
        axes.set_xlabel(unit)
        axes.set_ylabel("nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))

    ends = ", ".join(f"{label} {statistics.fmean(c[-1][1] for c in curves):.4f}" for label, curves in series.items())
    title = f"{CURVES[measure]} against {AXES[axis]}"
    return Chart(title, _svg(draw), f"{title}; at the end {ends} nats per token.", axis=axis)


def _series(group: Group, axis: str, measure: str) -> list[Points]:
    each = [[(point.x, point.measures[measure]) for point in curve(run, axis)] for run in group.runs]
    return [points for points in each if points and all(value is not None for _, value in points)]


def _unit(axis: str, longest: float) -> tuple[float, str]:
    """What an axis counts in, and its name."""
    if axis == "flops":
        return 1.0, "FLOPs of teacher and student"
    if axis == "seconds":
        size, name = (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 180 else (1.0, "seconds")
        return size, f"{name} in training steps"
    return 1.0, "tokens trained"


def _tail_mass(runs: Sequence[Run]) -> Chart:
    models = {run.name: run.evaluation["student"] for run in runs}
    teacher = runs[0].evaluation["teacher"]

    def draw(axes: Any) -> None:
        draw_tail_mass(axes, models, "mass outside the teacher's top K")
        if teacher is not None:
            axes.plot(*_points(teacher), label="teacher", marker="s", markersize=3, color=INK, linewidth=1.6)

    shown = {**models, **({"teacher": teacher} if teacher else {})}
    ends = ", ".join(f"{name} {measures['tail_mass']['10']:.3f}" for name, measures in shown.items())
    words = f"Probability mass outside the teacher's K first ids; at K = 10 {ends}."
    return Chart("Tail mass against K", _svg(draw), words, "" if teacher is None else _mismatch(teacher))


def draw_tail_mass(axes: Any, models: dict[str, dict[str, Any]], label: str) -> None:
    """The tail mass of each model's measures against K."""
    for number, (name, measures) in enumerate(models.items()):
        axes.plot(*_points(measures), label=name, marker="o", markersize=3, **_style(number))
    axes.set_xscale("log")
    axes.set_xticks(sizes := [int(k) for k in next(iter(models.values()))["tail_mass"]], [str(k) for k in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K")
    axes.set_ylabel(label)


def _mismatch(teacher: dict[str, Any]) -> str:
    return (
        f"The teacher's mismatch rate is {100 * teacher['mismatch_rate']:.1f} %: at that share of positions its first "
        "choice is not the token that the held-out text has there."
    )


def _points(measures: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [int(k) for k in measures["tail_mass"]], list(measures["tail_mass"].values())


def _reliability(runs: Sequence[Run]) -> Chart:
    teacher = runs[0].heldout["teacher"]

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.6)
        for number, run in enumerate(runs):
            axes.plot(*_reliable(run.heldout["student"]), label=run.name, **_style(number))
        if teacher is not None:
            axes.plot(*_reliable(teacher), label="teacher", color=INK, linewidth=1.6)
        axes.set_xlabel("confidence of the first choice")
        axes.set_ylabel("how often it is right")

    ends = ", ".join(f"{run.name} {100 * run.evaluation['student']['ece']:.2f} %" for run in runs)
    return Chart(
        "Calibration of the first choice",
        _svg(draw),
        f"Accuracy against confidence; expected calibration error {ends}.",
    )


def _reliable(heldout: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of the bins with enough predictions to speak of."""
    points = [point for point in heldout["reliability"] if point[2] >= LEAST_IN_A_BIN]
    return [point[0] for point in points], [point[1] for point in points]


def _log_reliability(runs: Sequence[Run]) -> Chart | None:
    """Of runs that have measured it."""
    teacher = runs[0].heldout["teacher"]
    tables = {run.name: run.heldout["student"].get("log_reliability") for run in runs}
    theirs = None if teacher is None else teacher.get("log_reliability")
    if not all(tables.values()):
        return None

    def draw(axes: Any) -> None:
        draw_log_reliability(axes, tables)
        if theirs:
            axes.plot(*_reliable_by_size(theirs), label="teacher", marker="s", markersize=3, color=INK, linewidth=1.6)

    ends = ", ".join(f"{run.name} {100 * run.evaluation['student']['log_ece']:.2f} %" for run in runs)
    return Chart(
        "Calibration of all probabilities",
        _svg(draw),
        "How often ids come true against the probability that they were given, the whole vocabulary at every position "
        f"in bins of a factor of 4; on the thin line both are the same. Calibration error over these bins {ends}.",
    )


def draw_log_reliability(axes: Any, tables: dict[str, list[list[float]]]) -> None:
    """Each model's observed frequency against its probability, down to the tail; see `LogEce.reliability`."""
    points = {name: _reliable_by_size(table) for name, table in tables.items()}
    lowest = min((min(one[0]) for one in points.values() if one[0]), default=0.1)
    axes.plot([lowest, 1], [lowest, 1], color=INK, linewidth=0.6)
    for number, (name, one) in enumerate(points.items()):
        axes.plot(*one, label=name, marker="o", markersize=3, **_style(number))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("probability of an id")
    axes.set_ylabel("how often it comes")


def _reliable_by_size(table: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean probability and frequency of the bins in which enough came or was expected to come."""
    points = [point for point in table if point[3] and max(point[2], point[3]) >= LEAST_IN_A_BIN]
    return [point[0] for point in points], [point[1] for point in points]


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.6}


def _short(value: float) -> str:
    for size, letter in SIZES:
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _svg(draw: Callable[[Any], None]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with drawn(draw) as figure:
        buffer = io.StringIO()
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_alpha(0)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace(INK, "currentColor")


@contextmanager
def drawn(draw: Callable[[Any], None], title: str = "") -> Iterator[Any]:
    """The figure, in the style of all of them; to be saved inside."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tailkd",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**settings, **ink}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        if title:
            figure.suptitle(title, fontsize=10)
        yield figure
