"""Charts as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from tailkd.report.record import Run

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5", "#6cc5b0")


def heldout_curve(runs: Sequence[Run], measure: str = "kl") -> str:
    """Held-out `measure` against tokens, one line per run."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        points = [(r["tokens_trained"], r[measure]) for r in run.evaluations() if r.get(measure) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=run.name, color=COLOURS[number % len(COLOURS)], linewidth=1.6)
    axes.set_xlabel("tokens trained")
    axes.set_ylabel("held-out KL(T||S), nats per token" if measure == "kl" else f"held-out {measure.replace('_', ' ')}")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend(frameon=False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
