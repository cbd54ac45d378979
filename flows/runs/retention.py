"""What a run keeps of what it made: after every step, payloads that nothing will read again are freed.

Manifests and records stay, so that the same run again, or a longer one, reuses all of it. What the run goes on from, what later
policies are compared with, what was evaluated and what reward models replay is never touched; nor is what another run that is
alive has pinned, or what another run that was recorded used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from pydantic import Field, NonNegativeFloat, PositiveInt

from flows.storage.gc import CONTINUES, OPTIMIZER_ONLY, Freed, Records, predecessor, step_tables
from pipeline import events
from pipeline.config import Config
from pipeline.events import EvaluationDone, Event, StageDone, StepDone, emit
from pipeline.store import Store
from pipeline.store.files import MissingArtifactError
from pipeline.store.pins import PinnedArtifactError

_AWAITED: Final = 4
"""Checkpoints of a stage that may be written later than they were made."""
_TRIED: Final = 32
"""Artifacts held by other runs that are tried again after a step."""


class KeepConfig(Config):
    """What stays of a run's payloads while it runs. It changes no result, no cache key, and not which run it is. Ours."""

    checkpoints: PositiveInt | None = 5
    """Newest checkpoints of the policy (and of the critic) that keep their weights; null: all. Whatever their age, policies
    that were evaluated, and those at the start of an iteration, keep them. The others are replayed when somebody reads them."""
    optimizer: PositiveInt | None = 5
    """Newest checkpoints that keep the optimizer's state, two thirds of one that is trained by AdamW; null: all. A run
    continues from the newest. More than 1 helps if that should be damaged."""
    rollouts: PositiveInt | None = None
    """Newest steps that keep their outputs, rewards and advantages; null: all. Outputs of the initial policy stay: other arms
    of an experiment have the same."""
    min_free_gb: NonNegativeFloat = Field(1.0)
    """Gigabytes that shall stay free on the store's disk beyond what a stage is expected to write. Less: the stage does not
    start, and the error says what to free."""

    @property
    def frees(self) -> bool:
        """Whether anything is ever freed."""
        return any(count is not None for count in (self.checkpoints, self.optimizer, self.rollouts))


class Retention:
    """Frees as a run goes; `take` is a fold. The work of a step does not grow with their number."""

    def __init__(
        self, store: Store, keep: KeepConfig, *, iteration_steps: int, spared: Callable[[], Collection[str]]
    ) -> None:
        """Take the store that the run uses, in which the run has its pins.

        Args:
            iteration_steps: steps of an iteration, whose last policy is the next one's reference.
            spared: digests that others have recorded as theirs.
        """
        self._store, self._keep, self._iteration_steps, self._spared = store, keep, iteration_steps, spared
        self.freed = 0
        """Bytes."""
        self._calls: list[str] = []
        """Keys of the calls since the last step."""
        self._policy = ""
        self._looked_back_at: set[str] = set()
        self._trained: set[str] = set()
        """Policies that came of an update."""
        self._weights: dict[str, deque[str]] = {}
        """Newest checkpoint of a chain -> the checkpoints of it that were written and still have weights to free."""
        self._states: dict[str, deque[str]] = {}
        self._unwritten: dict[str, deque[str]] = {}
        """Stage -> what it made last that was not written then; it may be by now, in the background or for a reader."""
        self._tables: deque[set[str]] = deque()
        self._due: deque[Freed] = deque()

    def take(self, event: Event) -> None:
        """Note one event, and free after a step."""
        match event:
            case StageDone() if self._keep.frees:
                self._calls.append(event.key)
            case EvaluationDone() if self._policy:
                self._looked_back_at.add(self._policy)
            case StepDone() if self._keep.frees:
                self._end_step(event)

    def _end_step(self, event: StepDone) -> None:
        # Those that the event names may have been made ahead, before the last step ended.
        records = Records(self._store.action(key) for key in dict.fromkeys([*self._calls, *event.calls]))
        self._calls = []
        for record in records.of(*CONTINUES):
            self._lengthen(record)
        updates = list(records.of("update_policy"))
        if updates:
            self._policy = updates[-1]["result"]
            if event.step % self._iteration_steps == 0:
                self._looked_back_at.add(self._policy)
            self._add_tables(step_tables(updates[-1], records, self._trained.__contains__))
            self._trained.add(self._policy)
        self._free()

    def _lengthen(self, record: Mapping[str, Any]) -> None:
        """Add a checkpoint to the chain that it continues; what falls out at the other end is due."""
        made, before = record["result"], predecessor(record)
        waiting = self._unwritten.setdefault(record["stage"], deque(maxlen=_AWAITED))
        waiting.append(made)
        written = [name for name in waiting if self._store.is_written(name)]
        for name in written:
            waiting.remove(name)
        for chains, count, files in (
            (self._states, self._keep.optimizer, OPTIMIZER_ONLY),
            (self._weights, self._keep.checkpoints if record["stage"] != "train_reward_model" else None, None),
        ):
            chain = chains.pop(before, None) or deque()
            chains[made] = chain
            chain.extend(written)
            while count is not None and len(chain) > count:
                old = chain.popleft()
                if old not in chain and (files or old not in self._looked_back_at):
                    self._due.append(Freed(old, files))
            if count is None:
                chain.clear()

    def _add_tables(self, tables: set[str]) -> None:
        if self._keep.rollouts is None:
            return
        self._tables.append(tables)
        while len(self._tables) > self._keep.rollouts:
            old = self._tables.popleft().difference(*self._tables)
            self._due.extend(Freed(digest) for digest in sorted(old))

    def _free(self) -> None:
        """Free what is due; what another run holds stays due, and this run no longer holds it."""
        if not self._due:
            return
        spared = self._spared()
        for _ in range(min(len(self._due), _TRIED)):
            freed = self._due.popleft()
            if freed.digest in spared:
                continue
            if freed.files is None:
                self._store.pins.remove(freed.digest)
            try:
                size = self._store.prune(freed.digest, freed.files)
                self.freed += size
                emit(events.Freed(freed.digest, freed.files is None, size))
            except PinnedArtifactError:
                self._due.append(freed)
            except MissingArtifactError:
                pass  # somebody removed it altogether
