"""Around a run: pins on what it uses, the disk it writes to, and what it frees as it goes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Final

from flows.config import IterativeRLConfig
from flows.runs.paths import Places
from flows.runs.record import read_records
from flows.runs.retention import KeepConfig, Retention
from flows.storage.gc import Freed, Records, superseded
from flows.storage.usage import Inventory, OtherRuns
from flows.wording import size
from pipeline.events import Event, StepDone, recording
from pipeline.store import Store
from pipeline.store.context import watching_disk
from pipeline.store.files import DiskWatch

_SUGGESTED: Final = {"optimizer": 1, "checkpoints": 2, "rollouts": 5}
"""What to keep when the disk is full, by the option of `cohort store prune`."""


@contextlib.contextmanager
def upkeep(store: Store, config: IterativeRLConfig, places: Places, run: str) -> Iterator[None]:
    """Pin what the run uses, watch the disk, and free what the configuration does not keep, inside the block."""
    others = OtherRuns(places, run, store)
    retention = Retention(store, config.keep, iteration_steps=config.steps, spared=others.digests)
    with store.pins.open(run), watching(store, config.keep, places) as watch:
        forecast = Forecast(watch, retention, config.keep, steps=config.iterations * config.steps)
        with recording(retention.take, forecast.take):
            yield


@contextlib.contextmanager
def watching(store: Store, keep: KeepConfig, places: Places) -> Iterator[DiskWatch]:
    """Let no stage inside the block start that would fill the disk."""
    margin = round(keep.min_free_gb * 1e9)
    with watching_disk(DiskWatch(store.root, margin, advice=lambda: ways_to_free(store, places))) as watch:
        yield watch


def ways_to_free(store: Store, places: Places) -> str:
    """The commands that would free space, and how much each."""
    inventory, records = Inventory(store), Records(store.actions())
    final = {run.policy for run in read_records(places)}
    held = set[str]().union(*(pins.digests for pins in store.pins.live()))
    offers = []
    for option, count in _SUGGESTED.items():
        counts: dict[str, int | None] = {**dict.fromkeys(_SUGGESTED), option: count}
        parts: list[Freed] = [part for part in superseded(records, final=final, **counts) if part.digest not in held]
        gain = inventory.bytes_freed(parts)
        if gain:
            offers.append(f"`cohort store prune --{option} {count}{places.option()}` frees {size(gain)}")
    return "; ".join(offers)


class Forecast:
    """Warns once where the steps that are left will not fit; `take` is a fold."""

    def __init__(self, watch: DiskWatch, retention: Retention, keep: KeepConfig, *, steps: int) -> None:
        """Take what writes and what frees, and how many steps the run has."""
        self._watch, self._retention, self._keep, self._steps = watch, retention, keep, steps
        # Until as many steps passed as are kept, nothing is freed; the first also makes what comes before RL.
        self._settling = max(keep.checkpoints or 1, keep.optimizer or 1, keep.rollouts or 1)
        self._written = 0
        self._start: tuple[int, int] | None = None
        """Steps computed and bytes on disk when it had settled."""
        self._computed = 0
        self._warned = False

    def take(self, event: Event) -> None:
        """Note one event."""
        if not isinstance(event, StepDone) or self._watch.written == self._written:
            return
        self._written = self._watch.written
        self._computed += 1
        taken = self._written - self._retention.freed
        if self._start is None:
            self._start = (self._computed, taken) if self._computed >= self._settling else None
            return
        steps, before = self._start
        per_step = (taken - before) / (self._computed - steps)
        self._look_ahead(per_step, self._steps - event.step)

    def _look_ahead(self, per_step: float, left: int) -> None:
        free = self._watch.free(self._watch.folder) - self._watch.margin
        if self._warned or per_step * left <= free:
            return
        self._warned = True
        advice = "" if self._keep.frees else "; keep.checkpoints, keep.optimizer and keep.rollouts bound what stays"
        warnings.warn(
            f"the disk of {self._watch.folder} will be full before this run ends: its last {left:,} steps take about "
            f"{size(per_step * left)}, and {size(max(0.0, free))} can be written{advice}",
            stacklevel=2,
        )
