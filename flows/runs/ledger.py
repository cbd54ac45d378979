"""The ledger of a run: every stage call that it came to, and which artifacts each step and each evaluation made.

A fold of the run's events, the same for a run that computes and for one that reuses everything: from the ledgers of an
experiment's runs follows what they share, and from digests everything that can be looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flows.runs.record import read_record
from pipeline.event_log import LOG, read_events
from pipeline.events import DriftDone, EvaluationDone, Event, StageDone, StepDone


@dataclass(frozen=True)
class Call:
    """A stage call, by its key."""

    stage: str
    digest: str
    """Of its result."""
    seconds: float
    """What it took when it was computed, by whichever run that was."""


@dataclass(frozen=True)
class EvaluationCalls:
    """One evaluation of the policy after a step on a held-out set."""

    step: int
    set: str
    mode: str
    """`greedy` or `sampled`."""
    artifacts: dict[str, str]
    """Stage -> digest of what it made for this evaluation: `rollout`, `score`, `count_votes`, `evaluate`."""

    @property
    def where(self) -> tuple[int, str, str]:
        """Which evaluation of the run."""
        return (self.step, self.set, self.mode)


@dataclass
class Ledger:
    """`take` is a fold. What a step or an evaluation asked for is in its event."""

    calls: dict[str, Call] = field(default_factory=dict)
    """By key, in the order in which they were first asked for."""
    steps: dict[int, dict[str, str]] = field(default_factory=dict)
    """Step -> stage -> digest of the last thing that stage made for it: `rollout`, `score`, `estimate_advantages`, ..."""
    evaluations: list[EvaluationCalls] = field(default_factory=list)
    _parts: dict[Hashable, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Part of the run (a step, an evaluation, a measure of drift) -> keys of its calls."""
    _since: list[str] = field(default_factory=list, repr=False)
    """Keys of calls that no part has named so far."""

    def take(self, event: Event) -> None:
        """Note one event; a part that is complete a second time replaces the first."""
        match event:
            case StageDone():
                self.calls[event.key] = Call(event.stage, event.result, event.seconds)
                self._since.append(event.key)
                return
            case StepDone():
                self.steps[event.step] = self._made(event.calls)
            case EvaluationDone():
                made = EvaluationCalls(event.step, event.set, event.mode, self._made(event.calls))
                where = (event.step, event.set, event.mode)
                known = [number for number, part in enumerate(self.evaluations) if part.where == where]
                place = known[0] if known else len(self.evaluations)
                self.evaluations[place : place + 1] = [made]
            case DriftDone():
                pass  # of outputs that nothing is learned from
            case _:
                return
        self._parts[event.slot()] = event.calls
        self._since = [key for key in self._since if key not in event.calls]  # the rest was made ahead of its part

    def current(self) -> Ledger:
        """Without the calls of parts that were replaced: those of an attempt with another version of a stage, or other data."""
        kept = {key for keys in (*self._parts.values(), self._since) for key in keys}
        calls = {key: call for key, call in self.calls.items() if key in kept}
        return Ledger(calls, self.steps, self.evaluations, self._parts, self._since)

    def _made(self, keys: Iterable[str]) -> dict[str, str]:
        calls = [self.calls[key] for key in keys if key in self.calls]
        return {call.stage: call.digest for call in calls}


def read_ledger(folder: Path, *, complete: bool = True) -> Ledger | None:
    """The ledger of a run's folder; None where no attempt ended well, or, unless `complete`, where none began."""
    record = read_record(folder)
    if record is None or (complete and not record.finished):
        return None
    ledger = Ledger()
    with contextlib.suppress(OSError):
        for event in read_events(folder / LOG, kinds=(StageDone, StepDone, EvaluationDone, DriftDone)):
            ledger.take(event)
    return ledger.current()
