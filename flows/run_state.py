"""What is known of a run from the reports of its stages: where it stands, what was computed, what was reused.

Fed with `pipeline.progress` reports; read by the live display, the final summary and the run's record. It holds numbers, no
text: how they look is the display's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["RunState", "StageTotals"]

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
class RunState:
    """The state of a run of `steps` steps; `take` is a listener of `pipeline.progress`."""

    steps: int
    """Of all iterations together."""
    iterations: int = 1
    clock: Callable[[], float] = time.monotonic
    stages: dict[str, StageTotals] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    """Digest -> stage, of everything this run computed or reused, in order."""
    stage: str | None = None
    """The stage that computes right now."""
    stage_since: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)
    """The last values that the computing stage reported."""
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

    def take(self, topic: str, values: dict[str, Any]) -> None:
        """Note one report."""
        match topic:
            case "stage":
                self._take_stage(**values)
            case "step":
                self._take_step(**values)
            case "evaluation":
                self.evaluations[values["set"], values["mode"]] = dict(values["metrics"])
                if self.step == 0:
                    self._step_started = self.clock()  # what came before is no part of the first step
            case "server":
                self.server_seconds += values.get("seconds", 0.0)
            case "drift" | "preflight":
                pass  # the display's alone
            case _:
                self.detail = dict(values)

    def warn(self, message: str) -> bool:
        """Note a warning; returns whether it is new."""
        if message in self.warnings:
            return False
        self.warnings.append(message)
        return True

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

    def _take_stage(self, name: str, outcome: str, seconds: float = 0.0, digest: str | None = None, **_: Any) -> None:
        totals = self.stages.setdefault(name, StageTotals())
        match outcome:
            case "started":
                self.stage, self.stage_since, self.detail = name, self.clock(), {}
                return
            case "executed":
                totals.executed += 1
                totals.seconds += seconds
            case "cached":
                totals.cached += 1
                totals.saved += seconds
            case "failed":
                totals.failed += 1
        if outcome != "cached":
            self.stage, self.ended, self.detail = None, self.detail, {}
        if digest:
            self.artifacts[digest] = name

    def _take_step(self, step: int, iteration: int, metrics: dict[str, float]) -> None:
        self.step, self.iteration, self.metrics = step, iteration, dict(metrics)
        now = self.clock()
        self.step_seconds, self._step_started = now - self._step_started, now
        self.step_executed, self._executed_before = self.executed - self._executed_before, self.executed
        # A first step also waited for the supervised policy; only whole steps forecast.
        if self.step_executed and step > 1:
            self._recent.append(self.step_seconds)
