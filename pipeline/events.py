"""What happens in a run, as typed events: emitted once by the flow and by `@stage`, and read by folds.

Whatever shows a run is a fold: it is given the events in order, live by `emit`, and later from the run's log
(`pipeline/event_log.py`). Events hold names (keys of calls, digests), never metrics: a fold looks those up in the action
records of the store. A study has a log as well; what it shows in MLflow no stage makes, and is in its events (`Logged`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field

from pipeline.orchestration.interruption import check
from pipeline.progress import failsafe
from pipeline.store.actions import Digest, Label, Moment, Seconds

LONGEST_TEXT: Final = 4000
"""Characters of an error or a warning in a log."""

_Count = Annotated[int, Field(ge=0, le=2**40)]
_Text = Annotated[str, Field(max_length=LONGEST_TEXT)]


@dataclass(frozen=True)
class Event:
    """What all events have: `emit` sets the time, `EventLog` the number and the attempt."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    number: Annotated[int, Field(ge=1, le=2**40)] = field(default=0, kw_only=True)
    time: Annotated[Moment, Field(gt=0)] = field(default=0.0, kw_only=True)
    """Seconds since the epoch."""
    attempt: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")] = field(default="", kw_only=True)
    """Which start of the run: `RunStarted` and all that follows from it have the same."""

    def slot(self) -> Hashable:
        """Where a later event of equal content is a repetition; None: nowhere."""
        return None

    def content(self) -> Hashable:
        """What a repetition has in common."""
        return json.dumps(self.values(), sort_keys=True)

    def values(self) -> dict[str, Any]:
        """What happened, by field: all but number, time and attempt."""
        names = [part.name for part in dataclasses.fields(self) if not part.kw_only]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RunStarted(Event):
    """A process began an attempt."""

    name: Label
    experiment: Label
    total_steps: _Count
    """Steps of all iterations together."""
    iterations: _Count
    command: str
    engine: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    process_start: str
    """When the process started, which with host and pid names it beyond doubt."""
    recipe: str = ""
    """The recipe, or the complete file, that the overrides were made to."""
    overrides: list[dict[str, Any]] = field(default_factory=list)
    """What was asked for, in its order (`flows/config/resolve.py: AskedOverride`)."""
    params: dict[str, str] = field(default_factory=dict)
    """The configuration by dotted key, and `diff.*`: what differs from an experiment's baseline."""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage call was not in the store and computes."""

    stage: Label
    key: Digest


@dataclass(frozen=True)
class StageDone(Event):
    """A stage call has its result."""

    stage: Label
    key: Digest
    result: Digest
    seconds: Seconds
    """What it took when it was computed, by whichever run that was."""
    cached: bool
    """Whether it was in the store."""

    def slot(self) -> Hashable:
        """One call."""
        return self.key

    def content(self) -> Hashable:
        """Whether it was found, and how long it took, is no difference."""
        return self.result


@dataclass(frozen=True)
class StageFailed(Event):
    """A stage call raised an error, an interrupt among them."""

    stage: Label
    key: Digest
    error: _Text


@dataclass(frozen=True)
class _Made(Event):
    """A part of the run is complete."""

    step: _Count
    """0: before the first update."""

    def slot(self) -> Hashable:
        """One part of the run."""
        return (type(self).__name__, self.step)


@dataclass(frozen=True)
class StepDone(_Made):
    """One pass through lines 5-10 of Algorithm 1 ended; `step` counts from 1."""

    iteration: _Count
    """Counted from 0."""
    made: dict[Label, Digest]
    """What the step came to -> key of the call; the step's metrics are those of their records, later ones win."""
    calls: tuple[Digest, ...] = ()
    """Keys of all calls since the part before this one, in their order. `emit` sets them."""


@dataclass(frozen=True)
class EvaluationDone(_Made):
    """The policy after a step was evaluated on a held-out set."""

    set: Label
    mode: Label
    """`greedy` or `sampled`."""
    made: dict[Label, Digest]
    """`evaluation` -> key of the call whose record has the metrics."""
    calls: tuple[Digest, ...] = ()

    def slot(self) -> Hashable:
        """One evaluation."""
        return (type(self).__name__, self.step, self.set, self.mode)


@dataclass(frozen=True)
class DriftDone(_Made):
    """Reward models were compared with the rules on held-out outputs."""

    made: dict[Label, Digest]
    """`<model>_<policy>` (`old_model_new_policy`, ...) -> key of the call whose record has the gauges."""
    calls: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class PreflightDone(_Made):
    """The first step's outputs and rewards were examined before the first update."""

    text: _Text
    metrics: dict[Label, float]
    """In the event since no stage makes them: they follow from tables that may be pruned later."""


@dataclass(frozen=True)
class Warned(Event):
    """A warning of this project."""

    text: _Text


@dataclass(frozen=True)
class Freed(Event):
    """A payload was freed: whole, or the files of an optimizer alone."""

    digest: Digest
    whole: bool
    bytes: _Count


@dataclass(frozen=True)
class Logged(Event):
    """A study has something for MLflow: a record of `pipeline/tracking/records.py`."""

    kind: Label
    name: str
    about: dict[str, Any]

    def slot(self) -> Hashable:
        """One thing that is shown."""
        return (type(self).__name__, self.kind, self.name)


@dataclass(frozen=True)
class RunEnded(Event):
    """An attempt ended; one without this event was killed, or runs."""

    status: Literal["finished", "failed", "interrupted"]
    seconds: Seconds
    executed: _Count = 0
    """Stage calls that computed."""
    cached: _Count = 0
    """Stage calls whose result was in the store. Counted here since repetitions are not written."""
    error: _Text = ""
    policy: Literal[""] | Digest = ""
    """Digest of the final policy."""
    before: dict[Label, dict[Label, float | None]] = field(default_factory=dict)
    """Held-out set -> accuracies before RL; here, so that a list of runs opens no store."""
    best: dict[Label, tuple[int, float | None]] = field(default_factory=dict)
    """Held-out set -> step and accuracy of the best evaluation."""
    final: dict[Label, dict[Label, float | None]] = field(default_factory=dict)


Fold = Callable[[Event], None]


@dataclass(frozen=True)
class _Run:
    folds: tuple[Fold, ...]
    since: list[str]
    """Keys of the calls since the last part that is complete."""


_one_at_a_time: Final = threading.RLock()
"""Two stages may compute side by side, in two threads; a fold hears one event at a time, and may emit further ones."""

_run: ContextVar[_Run | None] = ContextVar("cohort_run", default=None)


@contextlib.contextmanager
def recording(*folds: Fold) -> Iterator[None]:
    """Give what is emitted inside the block to `folds`, in their order; a block inside another adds to its folds."""
    outer = _run.get()
    token = _run.set(_Run((*outer.folds, *folds), outer.since) if outer else _Run(folds, []))
    try:
        yield
    finally:
        _run.reset(token)


@contextlib.contextmanager
def ahead_of_its_part() -> Iterator[list[str]]:
    """Emit inside the block as elsewhere, and yield the keys of its calls: they belong to a later part (`count_calls`)."""
    run, keys = _run.get(), list[str]()
    token = _run.set(None if run is None else _Run(run.folds, keys))
    try:
        yield keys
    finally:
        _run.reset(token)


def count_calls(keys: list[str]) -> None:
    """Count calls that were made ahead among those of the part that is in progress."""
    if (run := _run.get()) is not None:
        run.since.extend(keys)


def emit(event: Event) -> None:
    """Give an event to the folds of the run; an error in one costs a warning, never the work. Outside a run: nothing.

    Raises:
        KeyboardInterrupt: the run was interrupted, and the exception was lost on its way.
    """
    check()
    run = _run.get()
    if run is None:
        return
    with _one_at_a_time:
        match event:
            case StageDone():
                run.since.append(event.key)
            case StepDone() | EvaluationDone() | DriftDone():
                event = dataclasses.replace(event, calls=tuple(run.since))
                run.since.clear()
        event = dataclasses.replace(event, time=time.time())
        for fold in run.folds:
            with failsafe(f"what follows {type(event).__name__} ({getattr(fold, '__qualname__', fold)})"):
                fold(event)
