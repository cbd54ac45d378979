"""What keeping house costs a stage call and a step: the disk asked, a lease taken, old payloads freed, early and late in a run.

    python -m benchmarks.upkeep

Prints microseconds per call (best of five rounds), and for the freeing milliseconds per step early and late in a run of toy
stages. Limits: the disk's watch under 100 microseconds a call; a late step at most 1.2 times an early one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flows.runs.retention import KeepConfig, Retention
from pipeline.events import Event, StepDone
from pipeline.store import Store
from pipeline.store.files import DiskWatch
from tests.flows.toy_training import train

_CALLS, _ROUNDS, _STEPS = 200, 5, 300


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        digest = train(store, steps=1).policy
        watch = DiskWatch(store.root, 0)

        def watched() -> None:
            watch.before("update_policy", store.manifest)
            watch.wrote("update_policy", store.folder(digest))

        print(f"disk watched: {_microseconds(watched):.1f} microseconds a stage call")
        with store.pins.open("bench"):
            names = iter(f"{number:064x}" for number in range(_CALLS * _ROUNDS))
            print(f"lease taken: {_microseconds(lambda: store.pin(next(names))):.1f} microseconds a new artifact")
        early, late = _steps(Path(folder) / "steps")
        print(f"freeing: {1e3 * early:.2f} ms a step early, {1e3 * late:.2f} ms late, {late / early:.2f} times as much")


def _microseconds(call: Callable[[], None]) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append(time.perf_counter() - started)
    return 1e6 * min(rounds) / _CALLS


def _steps(root: Path) -> tuple[float, float]:
    """Seconds of freeing in a step: median of the second tenth of a run, and of its last."""
    seconds: list[float] = []
    plain = Retention.take

    def timed(self: Retention, event: Event) -> None:
        started = time.perf_counter()
        plain(self, event)
        if isinstance(event, StepDone):
            seconds.append(time.perf_counter() - started)

    Retention.take = timed  # type: ignore[assignment]
    try:
        train(Store(root), KeepConfig(checkpoints=2, optimizer=1, rollouts=2), steps=_STEPS)
    finally:
        Retention.take = plain  # type: ignore[method-assign]
    tenth = _STEPS // 10
    return sorted(seconds[tenth : 2 * tenth])[tenth // 2], sorted(seconds[-tenth:])[tenth // 2]


if __name__ == "__main__":
    main()
