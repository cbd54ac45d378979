"""What a flow tells the world about itself: one point of metrics per step, one per evaluation.

All numbers come from the artifacts' own records, so a cached run draws the same curves. The observer keeps them for the
summary and the learning curve and hands them to a tracker (MLflow); it never touches training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Protocol

from flows.charts import charted
from pipeline.artifact import Artifact
from pipeline.progress import failsafe, report
from stages.models import Checkpoint
from stages.tables import Evaluation

__all__ = ["Observer", "StepLog", "observer", "observing"]

_SAMPLING: Final = ("rollout/seconds",)


class StepLog(Protocol):
    """Where metrics go, by step: MLflow's tracker is one."""

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of one step; equal keys of one step may come in several calls, none of them twice."""
        ...


@dataclass
class Observer:
    """Collects the metrics of a run, by step (0 = before the first update)."""

    log: StepLog | None = None
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    policy: Checkpoint | None = None
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @failsafe("the observer of steps")
    def step(self, step: int, iteration: int, policy: Checkpoint, *others: Artifact | None) -> None:
        """One pass through lines 5-10 of Algorithm 1 ended with `policy`; `others` are what was made on the way."""
        metrics: dict[str, float] = {}
        for artifact in (*others, policy):
            metrics |= artifact.metrics if artifact else {}
        self.samples += int(metrics.get("rollout/samples", 0))
        self.tokens += int(metrics.get("rollout/tokens", 0))
        # Sampling, scoring and updating, as long as they took when they were computed: an axis to draw curves over.
        self.seconds += sum(value for name, value in metrics.items() if name.startswith("time/") or name in _SAMPLING)
        self.policy = policy
        progress = {
            "progress/iteration": iteration,
            "progress/samples": self.samples,
            "progress/tokens": self.tokens,
            "progress/seconds": self.seconds,
        }
        self._take(step, metrics | progress)
        report("step", step=step, iteration=iteration, metrics=metrics)

    @failsafe("the observer of evaluations")
    def evaluation(self, step: int, name: str, mode: str, result: Evaluation) -> None:
        """The policy after `step` was evaluated on the set `name`, greedily or by samples."""
        metrics = result.metrics
        if mode == "greedy":
            metrics = {f"greedy_{name}": metrics[name] for name in ("accuracy", "accuracy_ci_low", "accuracy_ci_high")}
        self._take(step, {f"eval/{name}/{key}": value for key, value in metrics.items()})
        report("evaluation", step=step, set=name, mode=mode, metrics=metrics)

    @failsafe("the observer of reward models")
    def drift(self, step: int, metrics: dict[str, float]) -> None:
        """After `step`, reward models were held against the rules on held-out outputs."""
        self._take(step, metrics)
        report("drift", step=step, metrics=metrics)

    @failsafe("the observer of first outputs")
    def preflight(self, metrics: dict[str, float], text: str) -> None:
        """Before the first update, the first step's outputs were examined; `text` says what they hold."""
        self._take(0, metrics)
        report("preflight", text=text)

    def _take(self, step: int, metrics: dict[str, float]) -> None:
        # Names read from records are new text each time; over thousands of steps they would be most of what is kept.
        self.points.setdefault(step, {}).update({sys.intern(name): value for name, value in metrics.items()})
        if self.log is not None:
            with failsafe("the tracker"):
                self.log.log_step(step, charted(metrics))


_current: ContextVar[Observer | None] = ContextVar("cohort_observer", default=None)


def observer() -> Observer:
    """The observer of the flow that is running; one that nobody reads outside of `observing`."""
    return _current.get() or Observer()


@contextlib.contextmanager
def observing(current: Observer) -> Iterator[Observer]:
    """Make `current` what flows called inside the block report to."""
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)
