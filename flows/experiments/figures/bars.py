"""Final accuracy by arm and held-out set, beside that before RL."""

from __future__ import annotations

from typing import Any

from flows.experiments.figures.claims import bounds_are, held_against, intervals_are, words
from flows.experiments.figures.figure import Sketch
from flows.experiments.figures.numbers import Estimate, Study
from flows.experiments.figures.style import GREY, grid, looks

__all__ = ["sketch_bars"]

_WIDE = 44
"""Letters that stand side by side under a panel, as wide as the longest name for each arm; with more, names stand aslant."""


def sketch_bars(study: Study) -> Sketch | None:
    """A panel per held-out set, a bar per arm with its bounds and its mean in figures; None where nothing was evaluated."""
    if not study.sets:
        return None
    look = looks([arm.name for arm in study.result.arms])
    canvas, panels = grid([""], [words(name) for name in study.sets])
    finals = {name: {arm: study.final(arm, name) for arm in study.arms} for name in study.sets}
    starts = {name: study.before(name) for name in study.sets}
    for name, values in finals.items():
        axes, before = panels["", words(name)], starts[name]
        for place, (arm, value) in enumerate(values.items()):
            bounds = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
            whiskers: dict[str, Any] = {} if value.over == "none" else {"yerr": bounds, "capsize": 4, "ecolor": "black"}
            axes.bar([place], [value.mean], width=0.66, color=look[arm].colour, alpha=0.8, label=arm, **whiskers)
        if before:
            axes.axhline(before.mean, color=GREY, linestyle="--", linewidth=1.4)
            axes.axhspan(before.low, before.high, color=GREY, alpha=0.12, linewidth=0)
        wide = max(map(len, values)) * len(values) > _WIDE
        aslant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if wide else {}
        gap = "  " if wide else "\n"
        labels = [f"{arm}{gap}{value.mean:.3f}" for arm, value in values.items()]
        axes.set_xticks(range(len(values)), labels, fontsize=10, **aslant)
        axes.set_xlim(-0.6, max(len(values), 2) - 0.4)
        axes.set_ylim(0, 1)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("greedy accuracy" if "greedy" in study.measure(name) else "accuracy")
    title = f"{study.result.experiment.name}: held-out accuracy of the final policies"
    return Sketch("bars", title, _caption(study, finals, starts), canvas)


def _caption(study: Study, finals: dict[str, dict[str, Estimate]], starts: dict[str, Estimate | None]) -> str:
    every = [value for values in finals.values() for value in values.values()]
    known = {name: before for name, before in starts.items() if before}
    line = " Dashed: before RL, with bounds of the same kind." if known else ""
    sentences = [f"Bars: mean of {study.seeds}. Whiskers: {bounds_are(every)}.{line}"]
    if told_apart := intervals_are(every):
        sentences.append(f"Above or below: the interval of the difference excludes 0 ({told_apart}).")
    for name, values in finals.items():
        found = []
        if name in known:
            found.append(held_against(values, "the policy before RL", known[name]))
        others = {arm: value for arm, value in values.items() if arm != study.baseline}
        if study.baseline and others:
            found.append(held_against(others, study.baseline, values[study.baseline]))
        if found:
            sentences.append(f"{words(name).capitalize()}: {'; '.join(found)}.")
    return " ".join(sentences)
