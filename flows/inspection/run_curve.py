"""Read the evaluations of a run from its metrics: what was measured on which held-out set after which step."""

from __future__ import annotations

from collections.abc import Mapping

from flows.wording import at_k

Curve = dict[int, dict[str, float]]
"""Step -> metric -> value, on one held-out set."""


def evaluations(points: Mapping[int, Mapping[str, float]]) -> dict[str, Curve]:
    """Return held-out set -> its curve, from metrics named `eval/<set>/<metric>`."""
    curves: dict[str, Curve] = {}
    for step in sorted(points):
        for key, value in points[step].items():
            if key.startswith("eval/"):
                _, name, metric = key.split("/", 2)
                curves.setdefault(name, {}).setdefault(step, {})[metric] = value
    return curves


def best(curve: Curve) -> tuple[int, float] | None:
    """Return the first step that reached the highest accuracy (of samples if there are any, else greedy), and it."""
    found = {step: metrics.get("accuracy", metrics.get("greedy_accuracy")) for step, metrics in curve.items()}
    known = {step: accuracy for step, accuracy in found.items() if accuracy is not None}
    step = max(known, key=lambda step: (known[step], -step), default=None)
    return None if step is None else (step, known[step])


def measures(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return label -> metric of what an evaluation has: greedy, samples, then Pass@K and Maj@K by K."""
    named = {"greedy": "greedy_accuracy", "sampled": "accuracy"}
    return {label: name for label, name in named.items() if name in metrics} | at_k(metrics)
