"""How reward models age over the iterations: their AUC against the rules on held-out outputs (`flows/algorithm/drift.py`)."""

from __future__ import annotations

from flows.experiments.figures.claims import bounds_are, brackets, intervals_are, is_above
from flows.experiments.figures.figure import Sketch
from flows.experiments.figures.numbers import Estimate, Study, estimate
from flows.experiments.figures.style import GREY, Look, draw_line, grid, legend_below
from flows.learning_curve import COLOURS

__all__ = ["sketch_ageing"]

_LINES = {
    "old_model_old_policy": ("old model, old policy", Look(COLOURS[0], "o", "-")),
    "old_model_new_policy": ("old model, new policy", Look(COLOURS[1], "s", "-")),
    "new_model_new_policy": ("new model, new policy", Look(COLOURS[2], "D", "--")),
    "new_model_old_policy": ("new model, old policy", Look(COLOURS[3], "^", "--")),
}
"""Which model on whose outputs: label and look."""
_READING = (
    "Old model: the one that gave an iteration's rewards; new: trained on after it. Old policy: at the iteration's start; new: "
    "at its end. Dotted: chance."
)
_CLAIMS = (
    ("old_model_old_policy", "old_model_new_policy"),
    ("new_model_new_policy", "old_model_new_policy"),
)
"""What Algorithm 1's line 11 is for: a model is worse on the policy that it trained, and retraining mends it."""

Ageing = dict[str, dict[int, Estimate]]
"""Which model on whose outputs -> step -> AUC."""


def sketch_ageing(study: Study) -> Sketch | None:
    """A panel for every arm that another does not continue; None where no reward model was measured twice."""
    shorter = {other for arm in study.arms if (other := study.continued(arm))}
    arms = {arm: ageing for arm in study.arms if arm not in shorter and (ageing := _ageing(study, arm))}
    if not arms:
        return None
    canvas, panels = grid([""], list(arms))
    for arm, ageing in arms.items():
        axes = panels["", arm]
        for key, points in ageing.items():
            label, look = _LINES[key]
            draw_line(axes, points, look, label, linewidth=1.5)
        axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2)
        axes.set_xlabel("step at which it was measured")
        axes.set_ylabel("AUC against the rules")
    fullest = max(arms, key=lambda arm: len(arms[arm]))
    legend_below(canvas, panels["", fullest])
    title = f"{study.result.experiment.name}: reward models held against the rules, on held-out outputs"
    return Sketch("ageing", title, _caption(study, arms), canvas)


def _ageing(study: Study, arm: str) -> Ageing:
    """Of the steps that all the arm's runs have; nothing where there is only one step, at which nothing has aged."""
    found: Ageing = {}
    for key in _LINES:
        curves = [one.curve for one in study.arms[arm]]
        metric = f"rm/held_out_auc/{key}"
        steps = sorted(set.intersection(*({step for step in curve if metric in curve[step]} for curve in curves)))
        if steps:
            found[key] = {step: estimate([curve[step][metric] for curve in curves]) for step in steps}
    return found if len({step for points in found.values() for step in points}) > 1 else {}


def _caption(study: Study, arms: dict[str, Ageing]) -> str:
    every = [point for ageing in arms.values() for points in ageing.values() for point in points.values()]
    sentences = [f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}. {_READING}", brackets(every)]
    if not intervals_are(every):
        sentences.append("Nothing is concluded from so few seeds.")
        return " ".join(filter(None, sentences))
    for arm, ageing in arms.items():
        for upper, lower in _CLAIMS:
            both = ageing.get(upper, {}).keys() & ageing.get(lower, {}).keys()
            if both:
                step = max(both)
                said = is_above(_LINES[upper][0], ageing[upper][step], _LINES[lower][0], ageing[lower][step])
                sentences.append(f"{arm}, after step {step}: {said}.")
    return " ".join(filter(None, sentences))
