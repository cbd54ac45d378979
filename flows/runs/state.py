"""Tell how far an attempt is: what was computed, what was reused, how long is left.

A fold of events, and of the progress reports of the stage that computes. The live display, the final summary and the end of the
attempt read it. It holds numbers, no text: how they look is the display's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from flows.runs.curve import Points
from pipeline.events import EvaluationDone, Event, StageDone, StageFailed, StageStarted, StepDone, Warned
from pipeline.progress import failsafe

_RECENT: Final = 10
"""Steps that the forecast of the time left averages over."""


@dataclass
class StageTotals:
    """One stage over the whole run."""

    executed: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Computing, in this run."""
    saved: float = 0.0
    """What the reused results took when they were computed."""

    @property
    def calls(self) -> int:
        """How often the stage was asked."""
        return self.executed + self.cached + self.failed


@dataclass
class Computing:
    """A stage call that computes right now."""

    stage: str
    since: float
    detail: dict[str, Any] = field(default_factory=dict)
    """The last values that it reported."""


@dataclass
class RunState:
    """The state of a run of `steps` steps; `take` is a fold, `note` a listener of `pipeline.progress`."""

    steps: int
    """Of all iterations together."""
    iterations: int = 1
    clock: Callable[[], float] = time.monotonic
    points: Points = field(default_factory=Points)
    stages: dict[str, StageTotals] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    """Digest -> stage, of everything this run computed or reused, in order."""
    computing: dict[str, Computing] = field(default_factory=dict)
    """By key, in the order in which they started: one, or two side by side (`overlap`)."""
    ended: dict[str, Any] = field(default_factory=dict)
    """The last values of the stage that ended last."""
    step: int = 0
    """Steps done; 0 = before the first."""
    iteration: int = 0
    """The iteration that the last step belongs to, counted from 0."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    step_seconds: float = 0.0
    """What the last step took, with the evaluation before it."""
    step_executed: int = 0
    """Stages that the last step had to compute."""
    evaluations: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    """The last evaluation of each set and mode."""

    warnings: list[str] = field(default_factory=list)
    """What was warned of, each once."""
    server_seconds: float = 0.0
    """Spent waiting for the Prefect server."""

    def __post_init__(self) -> None:
        self.started = self._step_started = self.clock()
        self._executed_before = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def take(self, event: Event) -> None:
        """Note one event."""
        with failsafe("the metrics of the run"):
            self.points.take(event)
        match event:
            case StageStarted():
                self.stages.setdefault(event.stage, StageTotals())
                self.computing[event.key] = Computing(event.stage, self.clock())
            case StageDone() | StageFailed():
                self._end_stage(event)
            case StepDone():
                self._end_step(event)
            case EvaluationDone():
                self.evaluations[event.set, event.mode] = self.points.last
                if self.step == 0:
                    self._step_started = self.clock()  # what came before is no part of the first step
            case Warned() if event.text not in self.warnings:
                self.warnings.append(event.text)

    def note(self, topic: str, values: dict[str, Any]) -> None:
        """Note how far a stage is, or what the Prefect server cost.

        A stage reports under its name; what it calls, under names of its own.
        """
        if topic == "server":
            self.server_seconds += values.get("seconds", 0.0)
        elif (call := self.reporting(topic)) is not None:
            call.detail = dict(values)

    def reporting(self, topic: str) -> Computing | None:
        """Return the call that a report is about: that of the stage of this name, else the one that started last."""
        calls = list(self.computing.values())
        return next((call for call in calls if call.stage == topic), calls[-1] if calls else None)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.clock() - self.started

    @property
    def executed(self) -> int:
        """Stage calls that computed."""
        return sum(totals.executed for totals in self.stages.values())

    @property
    def cached(self) -> int:
        """Stage calls whose result was in the store."""
        return sum(totals.cached for totals in self.stages.values())

    def seconds_left(self) -> float | None:
        """Forecast from the last steps that computed something, evaluations included; None before there is one."""
        if not self._recent:
            return None
        mean = sum(self._recent) / len(self._recent)
        return max(0.0, (self.steps - self.step) * mean - (self.clock() - self._step_started))

    def _end_stage(self, event: StageDone | StageFailed) -> None:
        totals = self.stages.setdefault(event.stage, StageTotals())
        match event:
            case StageFailed():
                totals.failed += 1
            case StageDone(cached=True):
                totals.cached += 1
                totals.saved += event.seconds
            case _:
                totals.executed += 1
                totals.seconds += event.seconds
        if isinstance(event, StageDone):
            self.artifacts[event.result] = event.stage
            if event.cached:
                return
        if (call := self.computing.pop(event.key, None)) is not None:
            self.ended = call.detail

    def _end_step(self, event: StepDone) -> None:
        self.step, self.iteration, self.metrics = event.step, event.iteration, self.points.last
        now = self.clock()
        self.step_seconds, self._step_started = now - self._step_started, now
        self.step_executed, self._executed_before = self.executed - self._executed_before, self.executed
        # A first step also waited for the supervised policy; only whole steps forecast.
        if self.step_executed and event.step > 1:
            self._recent.append(self.step_seconds)
