"""The metrics of a run by step (0 = before the first update), and the learning curve as a picture.

Events name calls, and all numbers come from the records of those calls, so that a run that reuses everything draws the same
curves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.artifact import Artifact
from pipeline.events import DriftDone, EvaluationDone, Event, PreflightDone, StepDone, emit
from pipeline.store import current_store
from stages.models import Checkpoint
from stages.tables import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLING: Final = "rollout/seconds"
_CONCURRENT: Final = "rollout/concurrent"
_UPDATING: Final = "time/update"
_GAUGES: Final = ("auc", "accuracy", "step_accuracy")
"""Of reward models on held-out outputs, those that are followed from model to model; all others are in the tables."""
_GREEDY: Final = ("accuracy", "accuracy_ci_low", "accuracy_ci_high")
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: distinct for colour-blind readers."""

Curve = Mapping[int, Mapping[str, float]]


def step_done(step: int, iteration: int, policy: Checkpoint, *others: Artifact | None) -> None:
    """Emit that one pass through lines 5-10 of Algorithm 1 ended with `policy`; `others` are what was made on the way."""
    made = {type(artifact).__name__.lower(): artifact for artifact in others if artifact is not None}
    emit(StepDone(step, iteration, calls_of(made | {"policy": policy})))


def evaluation_done(step: int, name: str, mode: str, result: Evaluation) -> None:
    """Emit that the policy after `step` was evaluated on the set `name`, `greedy` or `sampled`."""
    emit(EvaluationDone(step, name, mode, calls_of({"evaluation": result})))


def calls_of(made: Mapping[str, Artifact]) -> dict[str, str]:
    """What was made -> key of the call that returned it."""
    return {name: artifact.action for name, artifact in made.items() if artifact.action}


class Points:
    """A fold: step -> metrics. What a call measured is read from the store in use, or by `find`."""

    def __init__(
        self,
        find: Callable[[str], Mapping[str, Any]] | None = None,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        """Take what finds the record of a call, and what is given the metrics of each part of the run, with its step."""
        self._find = find or (lambda key: current_store().action(key))
        self._log = log
        self.by_step: dict[int, dict[str, float]] = {}
        self.last: dict[str, float] = {}
        """Metrics of the last part of the run, under the names that its record has."""
        self._totals: dict[int, tuple[float, float, float, float]] = {0: (0.0, 0.0, 0.0, 0.0)}
        """Step -> samples, tokens and seconds up to its end, and those of its update. A step done again replaces its own."""

    def take(self, event: Event) -> None:
        """Add the metrics of an event that has some."""
        match event:
            case StepDone():
                self.last = self._measured(event.made)
                self._add(event.step, self.last | self._progress(event.step, event.iteration, self.last))
            case EvaluationDone():
                found = self._measured(event.made)
                self.last = (
                    {f"greedy_{name}": found[name] for name in _GREEDY if name in found}
                    if event.mode == "greedy"
                    else found
                )
                self._add(event.step, {f"eval/{event.set}/{name}": value for name, value in self.last.items()})
            case DriftDone():
                self.last = {}
                for which, key in event.made.items():
                    found = self._measured({which: key})
                    known = [gauge for gauge in _GAUGES if f"rm/{gauge}" in found]
                    self.last |= {f"rm/held_out_{gauge}/{which}": found[f"rm/{gauge}"] for gauge in known}
                self._add(event.step, self.last)
            case PreflightDone():
                self._add(event.step, event.metrics)

    def _measured(self, made: Mapping[str, str]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for key in made.values():
            metrics |= self._find(key).get("metrics", {})
        return metrics

    def _progress(self, step: int, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sampling, scoring and updating, as long as they took when they were computed: an axis to draw curves over.

        Of outputs that were sampled during the update before, only what that took longer than the update.
        """
        before = next(number for number in range(step - 1, -1, -1) if number in self._totals)
        samples, tokens, seconds, update = self._totals[before]
        samples += int(metrics.get("rollout/samples", 0))
        tokens += int(metrics.get("rollout/tokens", 0))
        seconds += sum(value for name, value in metrics.items() if name.startswith("time/"))
        seconds += max(0.0, metrics.get(_SAMPLING, 0.0) - (update if metrics.get(_CONCURRENT) else 0.0))
        self._totals[step] = samples, tokens, seconds, metrics.get(_UPDATING, 0.0)
        done = {"iteration": iteration, "samples": samples, "tokens": tokens, "seconds": seconds}
        return {f"progress/{name}": value for name, value in done.items()}

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        # Names read from records are new text each time; over thousands of steps they would be most of what is kept.
        self.by_step.setdefault(step, {}).update({sys.intern(name): value for name, value in metrics.items()})
        if self._log is not None:
            self._log(step, metrics)


def draw_learning_curve(curve: Curve, file: Path, *, title: str) -> None:
    """Draw `curve` (step -> metrics under their MLflow names) into a PNG.

    Above: accuracy of samples (line, band = 95 % interval) and greedy (dashed) of every set. Below: mean reward by step, and
    shares of outputs that made a call and of calls that ended ok, where there is an environment.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"reward/mean": _draw_reward, "tool/used_rate": _draw_calls}
    below = [draw for key, draw in panels.items() if _series(curve, key)]
    figure = Figure(figsize=(8, 4.4 + 2.0 * len(below)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.2, *(1.0 for _ in below)]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_accuracy(axes[0], curve)
    axes[0].set_title(title, loc="left", fontsize=11)
    for draw, panel in zip(below, axes[1:], strict=True):
        draw(panel, curve)
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


def _draw_reward(axes: Axes, curve: Curve) -> None:
    axes.plot(*_xy(_series(curve, "reward/mean")), color="#444444", linewidth=1.4)
    axes.set_ylabel("reward, mean")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_calls(axes: Axes, curve: Curve) -> None:
    for key, label, line in (("used_rate", "outputs with a call", "-"), ("ok_rate", "calls that ended ok", "--")):
        axes.plot(*_xy(_series(curve, f"tool/{key}")), color="#444444", linewidth=1.4, linestyle=line, label=label)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("tool, share")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _series(curve: Curve, key: str) -> dict[int, float]:
    return {step: curve[step][key] for step in sorted(curve) if key in curve[step]}


def _xy(series: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(series), list(series.values())
