"""The learning curve of a run as a picture: held-out accuracy with its interval, and the training reward, against the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: distinct for colour-blind readers."""

Curve = Mapping[int, Mapping[str, float]]


def draw_learning_curve(curve: Curve, file: Path, *, title: str) -> None:
    """Draw `curve` (step -> metrics under their MLflow names) into a PNG.

    Above: accuracy of samples (line, band = 95 % interval) and greedy (dashed) of every set. Below: mean reward by step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rewards = _series(curve, "reward/mean")
    figure = Figure(figsize=(8, 6.4 if rewards else 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.2, 1.0] if rewards else [1.0]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_accuracy(axes[0], curve)
    axes[0].set_title(title, loc="left", fontsize=11)
    if rewards:
        _draw_reward(axes[1], rewards)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, format="png")


def _draw_accuracy(axes: Axes, curve: Curve) -> None:
    names = dict.fromkeys(key.split("/")[1] for metrics in curve.values() for key in metrics if key.startswith("eval/"))
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        sampled = _series(curve, f"eval/{name}/accuracy")
        label = name.replace("_", " ")
        if sampled:
            axes.plot(*_xy(sampled), color=colour, marker="o", markersize=3.5, linewidth=1.8, label=f"{label}, sampled")
            _draw_band(axes, curve, name, colour)
        greedy = _series(curve, f"eval/{name}/greedy_accuracy")
        if greedy:
            axes.plot(*_xy(greedy), color=colour, marker=".", linestyle="--", linewidth=1.2, label=f"{label}, greedy")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("accuracy, held-out")
    axes.grid(alpha=0.25)
    if names:
        axes.legend(frameon=False, fontsize=9, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_band(axes: Axes, curve: Curve, name: str, colour: str) -> None:
    low, high = (_series(curve, f"eval/{name}/accuracy_ci_{end}") for end in ("low", "high"))
    steps = sorted(low.keys() & high.keys())
    axes.fill_between(
        steps, [low[s] for s in steps], [high[s] for s in steps], color=colour, alpha=0.15, linewidth=0, label=None
    )


def _draw_reward(axes: Axes, rewards: Mapping[int, float]) -> None:
    axes.plot(*_xy(rewards), color="#444444", linewidth=1.4)
    axes.set_ylabel("reward, mean")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _series(curve: Curve, key: str) -> dict[int, float]:
    return {step: curve[step][key] for step in sorted(curve) if key in curve[step]}


def _xy(series: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(series), list(series.values())
