"""Figures of the distillation experiments."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from experiments._results import Row


def bars(path: Path, rows: Sequence[Row], key: str, *, x_title: str, title: str = "") -> None:
    """Draws a bar a row, with the seeds as dots on it; the axis begins near the smallest value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no plotting on import, and no global state
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained"))
    axes = canvas.figure.add_subplot()
    places = range(len(rows) - 1, -1, -1)
    axes.barh(places, [row.ours[key].mean for row in rows], color="tab:blue", alpha=0.5)
    axes.set_yticks(places, [row.name for row in rows], fontsize=8)
    for place, row in zip(places, rows, strict=True):
        values = row.ours[key].values
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    seen = list(itertools.chain.from_iterable(row.ours[key].values for row in rows))
    room = 0.1 * (max(seen) - min(seen)) or 1.0
    axes.set_xlim(max(0.0, min(seen) - 2 * room), max(seen) + room)
    axes.set_xlabel(x_title)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=120)
