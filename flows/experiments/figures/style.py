"""How all figures look: one colour, line and mark for each arm, sizes that stay readable at the width of a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flows.experiments.figures.numbers import Estimate
from flows.learning_curve import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["GREY", "Look", "draw_line", "grid", "legend_below", "looks", "plain"]

GREY: Final = "#555555"
_MARKS: Final = "osD^vPX*"
_LINES: Final = ("-", "--", "-.", ":")
_PANEL: Final = (4.6, 3.5)
"""Inches; two side by side are 9.2, at which text of 9 points is read where the picture is 800 pixels wide."""
_ABREAST: Final = 2
"""Panels side by side, at most, of a figure with one row: more go below."""

_LETTERS: Final = 13
"""Of a legend to the inch, about."""
_HANDLE: Final = 7
"""Letters that a line with its mark, and the gap after it, are as wide as."""


@dataclass(frozen=True)
class Look:
    """How one arm is drawn, in every figure of the experiment."""

    colour: str
    mark: str
    line: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """By place among the arms; after the last colour they begin anew with another line."""
    return {
        name: Look(COLOURS[n % len(COLOURS)], _MARKS[n % len(_MARKS)], _LINES[n // len(COLOURS) % len(_LINES)])
        for n, name in enumerate(names)
    }


def grid(rows: Sequence[str], columns: Sequence[str]) -> tuple[Canvas, Mapping[tuple[str, str], Axes]]:
    """A canvas with a panel for each row and column; columns are headed. A single row goes on below after two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrapped = len(rows) == 1 and len(columns) > _ABREAST
    across = _ABREAST if wrapped else len(columns)
    down = -(-len(columns) // across) if wrapped else len(rows)
    width, height = _PANEL
    canvas = Figure(figsize=(max(6.4, width * across), height * down + 0.7), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(down, across, squeeze=False).flatten()
    found = {}
    for place, (name, heading) in enumerate((name, heading) for name in rows for heading in columns):
        axes = found[name, heading] = panels[place]
        axes.set_title(" · ".join(filter(None, [heading, name if len(rows) > 1 else ""])), fontsize=11)
        plain(axes)
    for spare in panels[len(found) :]:
        spare.set_visible(False)
    return canvas, found


def plain(axes: Axes) -> None:
    """A light grid, and no frame where no axis is."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_line(axes: Axes, points: Mapping[int, Estimate], look: Look, label: str, **style: Any) -> None:
    """The means as a line with marks, the bounds as a band."""
    steps = list(points)
    drawn: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.8, "markersize": 4.5} | style
    axes.plot(steps, [points[step].mean for step in steps], color=look.colour, marker=look.mark, label=label, **drawn)
    lows, highs = [points[step].low for step in steps], [points[step].high for step in steps]
    if any(point.over != "none" for point in points.values()):
        axes.fill_between(steps, lows, highs, color=look.colour, alpha=0.12, linewidth=0)
        for edge in (lows, highs):  # bands that lie over one another are told apart by their edges
            axes.plot(steps, edge, color=look.colour, alpha=0.45, linewidth=0.7)


def legend_below(canvas: Canvas, axes: Axes) -> None:
    """One legend for all panels, under them: over no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(canvas.get_figwidth() * _LETTERS / (max(map(len, labels)) + _HANDLE))))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
