"""Plots of cost against size: a step of a long run, and rollouts through score and advantages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from flows.runs.curve import COLOURS

__all__ = ["plot_rollouts", "plot_steps"]

_WINDOW: Final = 50
"""Steps whose median is a point."""
_PARTS: Final = ("Prefect", "store", "tables", "stages", "MLflow", "log", "ledger, record", "display", "points")

Line = Mapping[str, Any]


def plot_steps(runs: Mapping[str, Sequence[Line]], file: Path) -> None:
    """Above milliseconds of a step by part, a column a run; below its memory and its open handles."""
    figure, axes = _figure(2, len(runs), width=3.6 * len(runs) + 1)
    for column, (run, lines) in enumerate(runs.items()):
        windows = [lines[start : start + _WINDOW] for start in range(1, max(2, len(lines) - _WINDOW + 2), _WINDOW)]
        at = [window[-1]["step"] for window in windows]
        heights = [[1e3 * _median(window, part) for window in windows] for part in _PARTS]
        axes[0][column].stackplot(at, heights, labels=_PARTS, colors=[*COLOURS, "#999999", "#F0E442"])
        axes[0][column].set_title(run, loc="left", fontsize=10)
        looks = [line for line in lines if "rss_mib" in line]
        steps = [line["step"] for line in looks]
        for key, label, colour in (("rss_mib", "memory, MiB", COLOURS[0]), ("handles", "open handles", COLOURS[1])):
            axes[1][column].plot(steps, [line[key] for line in looks], color=colour, label=label)
        axes[1][column].set_ylim(bottom=0)
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("ms a step (median of 50)")
    axes[0][-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1][-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, axes, file)


def plot_rollouts(lines: Sequence[Line], file: Path) -> None:
    """Left seconds against outputs, right the highest memory, by stage."""
    figure, axes = _figure(1, 2, width=8)
    for colour, stage in zip(COLOURS, ("write", "score", "advantages"), strict=False):
        found = [line for line in lines if line["stage"] == stage]
        outputs = [line["outputs"] for line in found]
        axes[0][0].plot(outputs, [line["computed_seconds"] for line in found], "o-", color=colour, label=stage)
        axes[0][1].plot(outputs, [line["own_mib"] for line in found], "o-", color=colour, label=f"{stage}, its own")
        axes[0][1].plot(outputs, [line["mapped_mib"] for line in found], "o:", color=colour, label="mapped files")
    axes[0][0].set(xscale="log", yscale="log", ylabel="seconds, without the store", xlabel="outputs")
    axes[0][1].set(xscale="log", ylabel="MiB beyond the start", xlabel="outputs")
    for part in axes[0]:
        part.legend(frameon=False, fontsize=7)
    _save(figure, axes, file)


def _median(window: Iterable[Line], part: str) -> float:
    return median(line["parts"].get(part, 0.0) for line in window)


def _figure(rows: int, columns: int, *, width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.6 * rows + 0.4), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, axes: Any, file: Path) -> None:
    for part in axes.flat:
        part.grid(alpha=0.25)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")
