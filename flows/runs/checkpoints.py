"""When the policy, and the critic, of a step are written to disk; what is not written is replayed when somebody reads it."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal

from pydantic import PositiveInt

from pipeline.config import Config
from pipeline.events import Event, StageDone, recording
from pipeline.store import Store, current_store
from pipeline.store.context import Payloads, writing_payloads
from pipeline.store.files import draft_folder, free_bytes, fsync
from stages.models import Checkpoint

_SMALL: Final = 64 * 2**20
"""Bytes that are written after every step: they take less time than the rest of any step."""
_SHARE: Final = 20
"""Times as long as writing took, `auto` waits before it writes again."""
_OF_FREE: Final = 10
"""Checkpoints that `auto` writes take at most this part of what would be free without them."""
_SAMPLE: Final = 32 * 2**20


class CheckpointConfig(Config):
    """Which steps leave a checkpoint. It changes no result, no cache key, and not which run it is. Ours."""

    every: PositiveInt | Literal["auto"] = "auto"
    """Steps from one checkpoint to the next. Policies between two are in memory while the run goes on. Later they are replayed
    from the last checkpoint: what they learned from is stored, nothing is sampled again. `auto`: every step up to 64 MiB, else
    so that writing takes at most a twentieth of the time, and all of them a tenth of the free disk. Always written are
    policies that are evaluated, those at the start of an iteration, and the last."""
    background: bool = True
    """Write checkpoints of more than 64 MiB while the next stage runs, from a copy in memory (12 bytes a parameter with AdamW).
    The last one is written before the run ends."""


def interval_of(config: CheckpointConfig, size: float, writing: float, step: float) -> int:
    """Return the steps between two checkpoints.

    Args:
        size: bytes of a checkpoint.
        writing, step: seconds that writing it takes, and a step without that.
    """
    if config.every != "auto":
        return config.every
    return 1 if size <= _SMALL else max(1, math.ceil(_SHARE * writing / step))


def has_room(size: float, there: float, free: float) -> bool:
    """Return whether `auto` may write a checkpoint of `size` bytes to those that are there; `free` bytes are without them."""
    return size <= _SMALL or (there + size) * _OF_FREE <= free


class Checkpoints:
    """Decide for each step of a run whether its trained state is written."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        last: int,
        always: Callable[[int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the run's settings, its last step, and whether a step is one whose policy is always written."""
        self._every, self._background = config.every, config.background
        self._last, self._always, self._clock = last, always, clock
        self._bytes = 0
        """Of what the last step that wrote anything wrote."""
        self._there: dict[str, int] = {}
        """Large checkpoints of this process, and their bytes."""
        self._written = clock()
        self._seconds = 0.0
        """What writing these bytes takes."""

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Let the updates of `step` inside the block write what they train if a checkpoint is due."""
        made: list[str] = []

        def take(event: Event) -> None:
            if isinstance(event, StageDone) and not event.cached:
                made.append(event.result)

        when = self.when(step)
        with recording(take), writing_payloads(when):
            yield
        if when != "never" and made:
            self._note(current_store(), made)

    def when(self, step: int) -> Payloads:
        """Return when the policy after `step` is written."""
        if not self._is_due(step):
            return "never"
        return "background" if self._background and self._bytes > _SMALL and step != self._last else "now"

    def _is_due(self, step: int) -> bool:
        if self._always(step):
            return True
        if self._every != "auto":
            return step % self._every == 0
        if self._bytes <= _SMALL:
            return True
        if self._clock() - self._written < _SHARE * self._seconds:
            return False
        store = current_store()
        self._there = {name: size for name, size in self._there.items() if not store.freed(name)}
        there = sum(self._there.values())
        return has_room(self._bytes, there, free_bytes(store.root) + there)

    def _note(self, store: Store, made: list[str]) -> None:
        """Note how much was written, and what that takes."""
        before, self._written = self._bytes, self._clock()
        if all(store.is_written(name) for name in made):  # else a thread has begun to
            sizes = {name: sum(file["size"] for file in store.manifest(name)["files"]) for name in made}
            self._bytes = sum(sizes.values())
        else:
            sizes = dict.fromkeys(made, self._bytes // len(made))
        self._there |= sizes if self._bytes > _SMALL else {}
        if self._bytes > _SMALL and self._bytes != before and self._every == "auto":
            rate = measured_rate(store)
            self._seconds = self._bytes / rate if rate else math.inf


def written(policy: Checkpoint) -> Checkpoint:
    """Return the policy, which is written if it was not: one of a longer run, say, whose last it was not."""
    if policy.content is None:
        current_store().make_whole(policy.digest)
    return policy


def measured_rate(store: Store) -> float:
    """Return the bytes per second that the store's disk takes, synced; 0 where it takes none."""
    with contextlib.suppress(OSError), draft_folder(store.root) as draft:
        started = time.perf_counter()
        (draft / "sample").write_bytes(os.urandom(1 << 20) * (_SAMPLE >> 20))
        fsync(draft / "sample")
        return _SAMPLE / (time.perf_counter() - started)
    return 0.0
