"""Accuracy against the step, by arm (DeepSeekMath, Fig. 5); iterations continue one another on one axis (Fig. 6)."""

from __future__ import annotations

from collections.abc import Mapping

from flows.experiments.figures.claims import bounds_are, brackets, in_order, listed, words
from flows.experiments.figures.figure import Sketch
from flows.experiments.figures.numbers import Estimate, Study
from flows.experiments.figures.style import draw_line, grid, legend_below, looks

__all__ = ["sketch_curves"]

_FEWEST = 3
"""Evaluations that make a curve; with two there is a before and an after, which bars show."""


def sketch_curves(study: Study) -> Sketch | None:
    """A panel per held-out set, a line per arm; None where no arm has a curve on any set.

    An arm whose runs went on from another's final policies is drawn from there on only.
    """
    curves = {name: _curves(study, name) for name in study.sets}
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return None
    from matplotlib.ticker import MaxNLocator

    after = {arm: other for arm in study.arms if (other := study.continued(arm))}
    look = looks([arm.name for arm in study.result.arms])
    canvas, panels = grid([""], [words(name) for name in curves])
    for name, lines in curves.items():
        axes = panels["", words(name)]
        for arm, points in lines.items():
            start = max(lines[after[arm]]) if after.get(arm) in lines else 0
            draw_line(axes, {step: points[step] for step in points if step >= start}, look[arm], arm)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("greedy accuracy" if "greedy" in study.measure(name) else "accuracy")
    legend_below(canvas, next(iter(panels.values())))
    layout = "layout of the paper's Fig. 6" if after else "layout of the paper's Fig. 5"
    title = f"{study.result.experiment.name}: held-out accuracy against the step ({layout})"
    return Sketch("curves", title, _caption(study, curves, after), canvas)


def _curves(study: Study, held_out: str) -> dict[str, dict[int, Estimate]]:
    """Arm -> step -> accuracy, of arms that were evaluated often enough."""
    steps = {arm: study.steps(arm, held_out) for arm in study.arms}
    return {
        arm: {step: study.at(arm, held_out, step) for step in found}
        for arm, found in steps.items()
        if len(found) >= _FEWEST
    }


def _caption(study: Study, curves: Mapping[str, Mapping[str, Mapping[int, Estimate]]], after: Mapping[str, str]) -> str:
    every = [point for lines in curves.values() for points in lines.values() for point in points.values()]
    sentences = [f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}."]
    if after:
        going_on = [f"{arm} goes on from {other}" for arm, other in after.items()]
        sentences.append(f"{listed(going_on)}, and {'is' if len(after) == 1 else 'are'} drawn from there on.")
    sentences.append(brackets(every))
    for name, lines in curves.items():
        found = list(in_order({arm: points[max(points)] for arm, points in lines.items()}))
        if found:
            sentences.append(f"At the end, {words(name)}: {'; '.join(found)}.")
    return " ".join(filter(None, sentences))
