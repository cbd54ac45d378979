"""The metrics of a run by step: one point per step, evaluation and measure of drift (0 = before the first update).

Events name calls, and all numbers come from the records of those calls, so that a run that reuses everything draws the same
curves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from pipeline.artifact import Artifact
from pipeline.events import DriftDone, EvaluationDone, Event, PreflightDone, StepDone, emit
from pipeline.store import current_store
from stages.models import Checkpoint
from stages.tables import Evaluation

_SAMPLING: Final = "rollout/seconds"
_CONCURRENT: Final = "rollout/concurrent"
_UPDATING: Final = "time/update"
_GAUGES: Final = ("auc", "accuracy", "step_accuracy")
"""Of reward models on held-out outputs, those that are followed from model to model; all others are in the tables."""
_GREEDY: Final = ("accuracy", "accuracy_ci_low", "accuracy_ci_high")


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
