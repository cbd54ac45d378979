"""How figures look, and those with a line or bar per arm: curves (DeepSeekMath, Fig. 5 and 6), bars, ageing, calls.

Every arm has one colour, line and mark in all figures. Sizes stay readable at the width of a README.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flows.experiments.figures.claims import (
    bounds_are,
    brackets,
    compared_with,
    in_order,
    intervals_are,
    is_above,
    listed,
    words,
)
from flows.experiments.figures.numbers import Estimate, Study, estimate
from flows.runs.curve import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_GREY: Final = "#555555"
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
_WIDE: Final = 44
"""Letters that fit under a panel, as wide as the longest name for each arm; with more, names are slanted."""
_FEWEST: Final = 3
"""Evaluations that make a curve; with two there is a before and an after, which bars show."""

Points = Mapping[int, Estimate]
"""Step -> estimate."""


@dataclass(frozen=True)
class Sketch:
    """A figure that is drawn and not written yet."""

    name: str
    title: str
    caption: str
    canvas: Canvas


@dataclass(frozen=True)
class Look:
    """How one arm is drawn, in every figure of the experiment."""

    colour: str
    mark: str
    line: str


def _looks(study: Study) -> dict[str, Look]:
    """Return looks by place among the arms; after the last colour they begin anew with another line."""
    return {
        arm.name: Look(COLOURS[n % len(COLOURS)], _MARKS[n % len(_MARKS)], _LINES[n // len(COLOURS) % len(_LINES)])
        for n, arm in enumerate(study.result.arms)
    }


def grid(rows: Sequence[str], columns: Sequence[str]) -> tuple[Canvas, Mapping[tuple[str, str], Axes]]:
    """Make a canvas with a panel for each row and column, headed. A single row goes on below after two panels."""
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
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for spare in panels[len(found) :]:
        spare.set_visible(False)
    return canvas, found


def draw_line(axes: Axes, points: Points, look: Look, label: str, **style: Any) -> None:
    """Draw the means as a line with marks, the bounds as a band."""
    steps = list(points)
    drawn: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.8, "markersize": 4.5} | style
    axes.plot(steps, [points[step].mean for step in steps], color=look.colour, marker=look.mark, label=label, **drawn)
    lows, highs = [points[step].low for step in steps], [points[step].high for step in steps]
    if any(point.over != "none" for point in points.values()):
        axes.fill_between(steps, lows, highs, color=look.colour, alpha=0.12, linewidth=0)
        for edge in (lows, highs):  # bands that overlap are distinguished by their edges
            axes.plot(steps, edge, color=look.colour, alpha=0.45, linewidth=0.7)


def legend_below(canvas: Canvas, axes: Axes) -> None:
    """Draw one legend for all panels, under them: over no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(canvas.get_figwidth() * _LETTERS / (max(map(len, labels)) + _HANDLE))))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _accuracy(study: Study, held_out: str) -> str:
    return "greedy accuracy" if "greedy" in study.measure(held_out) else "accuracy"


# ------------------------------------------------------------------------------------------------ curves


def sketch_curves(study: Study) -> Sketch | None:
    """Draw accuracy against the step: a panel per held-out set, a line per arm; None where no arm has a curve on any set.

    An arm whose runs went on from another's final policies is drawn from there on only: iterations share one axis.
    """
    curves = {name: _curves(study, name) for name in study.sets}
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return None
    from matplotlib.ticker import MaxNLocator

    after = {arm: other for arm in study.arms if (other := study.continued(arm))}
    look = _looks(study)
    canvas, panels = grid([""], [words(name) for name in curves])
    for name, lines in curves.items():
        axes = panels["", words(name)]
        for arm, points in lines.items():
            start = max(lines[after[arm]]) if after.get(arm) in lines else 0
            draw_line(axes, {step: points[step] for step in points if step >= start}, look[arm], arm)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(_accuracy(study, name))
    legend_below(canvas, next(iter(panels.values())))
    layout = "layout of the paper's Fig. 6" if after else "layout of the paper's Fig. 5"
    title = f"{study.result.experiment.name}: held-out accuracy against the step ({layout})"
    return Sketch("curves", title, " ".join(filter(None, _about_curves(study, curves, after))), canvas)


def _curves(study: Study, held_out: str) -> dict[str, Points]:
    """Return accuracy by arm and step, of arms that were evaluated often enough."""
    steps = {arm: study.steps(arm, held_out) for arm in study.arms}
    return {
        arm: {step: study.at(arm, held_out, step) for step in found}
        for arm, found in steps.items()
        if len(found) >= _FEWEST
    }


def _about_curves(study: Study, curves: Mapping[str, Mapping[str, Points]], after: Mapping[str, str]) -> Iterator[str]:
    every = [point for lines in curves.values() for points in lines.values() for point in points.values()]
    yield f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}."
    if after:
        going_on = [f"{arm} goes on from {other}" for arm, other in after.items()]
        yield f"{listed(going_on)}, and {'is' if len(after) == 1 else 'are'} drawn from there on."
    yield brackets(every)
    for name, lines in curves.items():
        if found := list(in_order({arm: points[max(points)] for arm, points in lines.items()})):
            yield f"At the end, {words(name)}: {'; '.join(found)}."


# ------------------------------------------------------------------------------------------------ bars


def sketch_bars(study: Study) -> Sketch | None:
    """Draw final accuracy: a panel per held-out set, a bar per arm with bounds and mean; None where nothing was evaluated."""
    if not study.sets:
        return None
    canvas, panels = grid([""], [words(name) for name in study.sets])
    finals = {name: {arm: study.final(arm, name) for arm in study.arms} for name in study.sets}
    starts = {name: study.before(name) for name in study.sets}
    for name, values in finals.items():
        axes = panels["", words(name)]
        _draw_bars(axes, values, starts[name], _looks(study))
        axes.set_ylabel(_accuracy(study, name))
    title = f"{study.result.experiment.name}: held-out accuracy of the final policies"
    return Sketch("bars", title, " ".join(_about_bars(study, finals, starts)), canvas)


def _draw_bars(axes: Axes, values: Mapping[str, Estimate], before: Estimate | None, look: Mapping[str, Look]) -> None:
    for place, (arm, value) in enumerate(values.items()):
        bounds = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
        whiskers: dict[str, Any] = {} if value.over == "none" else {"yerr": bounds, "capsize": 4, "ecolor": "black"}
        axes.bar([place], [value.mean], width=0.66, color=look[arm].colour, alpha=0.8, label=arm, **whiskers)
    if before:
        axes.axhline(before.mean, color=_GREY, linestyle="--", linewidth=1.4)
        axes.axhspan(before.low, before.high, color=_GREY, alpha=0.12, linewidth=0)
    wide = max(map(len, values)) * len(values) > _WIDE
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    gap = "  " if wide else "\n"
    labels = [f"{arm}{gap}{value.mean:.3f}" for arm, value in values.items()]
    axes.set_xticks(range(len(values)), labels, fontsize=10, **slanted)
    axes.set_xlim(-0.6, max(len(values), 2) - 0.4)
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")


def _about_bars(
    study: Study, finals: Mapping[str, Mapping[str, Estimate]], starts: Mapping[str, Estimate | None]
) -> Iterator[str]:
    every = [value for values in finals.values() for value in values.values()]
    line = " Dashed: before RL, with bounds of the same kind." if any(starts.values()) else ""
    yield f"Bars: mean of {study.seeds}. Whiskers: {bounds_are(every)}.{line}"
    if intervals := intervals_are(every):
        yield f"Above or below: the interval of the difference excludes 0 ({intervals})."
    for name, values in finals.items():
        found = []
        if before := starts[name]:
            found.append(compared_with(values, "the policy before RL", before))
        others = {arm: value for arm, value in values.items() if arm != study.baseline}
        if study.baseline and others:
            found.append(compared_with(others, study.baseline, values[study.baseline]))
        if found:
            yield f"{words(name).capitalize()}: {'; '.join(found)}."


# ------------------------------------------------------------------------------------------------ ageing

_AGEING: Final = {
    "old_model_old_policy": ("old model, old policy", Look(COLOURS[0], "o", "-")),
    "old_model_new_policy": ("old model, new policy", Look(COLOURS[1], "s", "-")),
    "new_model_new_policy": ("new model, new policy", Look(COLOURS[2], "D", "--")),
    "new_model_old_policy": ("new model, old policy", Look(COLOURS[3], "^", "--")),
}
"""Which model on whose outputs: label and look."""
_READING: Final = (
    "Old model: the one that gave an iteration's rewards; new: trained on after it. Old policy: at the iteration's start; new: "
    "at its end. Dotted: chance."
)
_CLAIMS: Final = (
    ("old_model_old_policy", "old_model_new_policy"),
    ("new_model_new_policy", "old_model_new_policy"),
)
"""What Algorithm 1's line 11 is for: a model is worse on the policy that it trained, and retraining fixes it."""


def sketch_ageing(study: Study) -> Sketch | None:
    """Draw the AUC of reward models against the rules on held-out outputs (`flows/algorithm/rewards.py`).

    A panel for every arm that another does not continue; None where no reward model was measured twice.
    """
    shorter = {other for arm in study.arms if (other := study.continued(arm))}
    arms = {arm: ageing for arm in study.arms if arm not in shorter and (ageing := _ageing(study, arm))}
    if not arms:
        return None
    canvas, panels = grid([""], list(arms))
    for arm, ageing in arms.items():
        axes = panels["", arm]
        for key, points in ageing.items():
            label, look = _AGEING[key]
            draw_line(axes, points, look, label, linewidth=1.5)
        axes.axhline(0.5, color=_GREY, linestyle=":", linewidth=1.2)
        axes.set_xlabel("step at which it was measured")
        axes.set_ylabel("AUC against the rules")
    fullest = max(arms, key=lambda arm: len(arms[arm]))
    legend_below(canvas, panels["", fullest])
    title = f"{study.result.experiment.name}: reward models compared with the rules, on held-out outputs"
    return Sketch("ageing", title, " ".join(filter(None, _about_ageing(study, arms))), canvas)


def _ageing(study: Study, arm: str) -> dict[str, Points]:
    """Return AUC by which model on whose outputs and step, of the steps that all the arm's runs have.

    Empty where there is only one step, at which nothing has aged.
    """
    found = {key: points for key in _AGEING if (points := _points(study, arm, f"rm/held_out_auc/{key}"))}
    return found if len({step for points in found.values() for step in points}) > 1 else {}


def _points(study: Study, arm: str, metric: str) -> Points:
    """Return a metric by step, of the steps at which all the arm's runs have it."""
    curves = [one.curve for one in study.arms[arm]]
    steps = sorted(set.intersection(*({step for step in curve if metric in curve[step]} for curve in curves)))
    return {step: estimate([curve[step][metric] for curve in curves]) for step in steps}


def _about_ageing(study: Study, arms: Mapping[str, Mapping[str, Points]]) -> Iterator[str]:
    every = [point for ageing in arms.values() for points in ageing.values() for point in points.values()]
    yield f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}. {_READING}"
    yield brackets(every)
    if not intervals_are(every):
        yield "Nothing is concluded from so few seeds."
        return
    for arm, ageing in arms.items():
        for upper, lower in _CLAIMS:
            if both := ageing.get(upper, {}).keys() & ageing.get(lower, {}).keys():
                step = max(both)
                said = is_above(_AGEING[upper][0], ageing[upper][step], _AGEING[lower][0], ageing[lower][step])
                yield f"{arm}, after step {step}: {said}."


# ------------------------------------------------------------------------------------------------ calls

_CALLS: Final = {
    "tool/used_rate": "share of outputs with a call",
    "tool/calls_mean": "calls of an output",
    "tool/ok_rate": "share of calls that ended ok",
    "time/tools": "seconds that tools took",
}
"""Metrics of `stages.environment.answer_calls`, each with what its panel shows."""


def sketch_calls(study: Study) -> Sketch | None:
    """Draw what outputs called while they were learned from, against the step; None where no arm has an environment."""
    arms = [arm for arm in study.arms if len(_points(study, arm, "tool/used_rate")) > 1]
    if not arms:
        return None
    look = _looks(study)
    canvas, panels = grid([""], list(_CALLS.values()))
    drawn = {key: {arm: _points(study, arm, key) for arm in arms} for key in _CALLS}
    for key, heading in _CALLS.items():
        axes = panels["", heading]
        for arm, points in drawn[key].items():
            draw_line(axes, points, look[arm], arm, markersize=0)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.03 if heading.startswith("share") else None)
    legend_below(canvas, panels["", _CALLS["tool/used_rate"]])
    every = [point for lines in drawn.values() for points in lines.values() for point in points.values()]
    about = f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}. Outputs are those that each step learned from."
    return Sketch("calls", f"{study.result.experiment.name}: calls to the environment against the step", about, canvas)
