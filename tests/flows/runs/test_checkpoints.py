"""Which steps leave a checkpoint, and when it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.config.recipes import arithmetic_smoke
from flows.runs import checkpoints
from flows.runs.checkpoints import CheckpointConfig, Checkpoints, measured_rate
from pipeline.artifact import Folder
from pipeline.config import ConfigError
from pipeline.events import StageDone, emit
from pipeline.store import Store, current_store
from pipeline.store.context import Call, payloads, running

KIB = 2**10


@pytest.fixture(autouse=True)
def _small_is_less_than_100_kib(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KiB in place of 64 MiB: what is written is hashed, and only ratios matter."""
    monkeypatch.setattr(checkpoints, "_SMALL", 64 * KIB)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def schedule(every: int | str, *, last: int = 100, background: bool = True, clock: Clock | None = None) -> Checkpoints:
    config = CheckpointConfig.model_validate({"every": every, "background": background})
    return Checkpoints(config, last=last, always=lambda step: step in (5, last), clock=clock or Clock())


def train(made: Checkpoints, step: int, size: int) -> str:
    """One step: what is said of payloads inside, after an update that left that many bytes."""

    def fill(folder: Path) -> None:
        with open(folder / "weights", "wb") as file:
            file.truncate(size)

    with made.at(step):
        when = payloads()
        call = Call("update_policy", "1", {"step": step})
        with running(call):
            Folder.write_derived(fill) if when == "now" else Folder.write_description(fill, ["x"])
        emit(StageDone("update_policy", call.key, call.key, 1.0, cached=False))
    return when


def written_in(steps: Iterable[int], *, seconds: float) -> Iterator[tuple[int, Checkpoints]]:
    """Train steps that take some seconds and leave 100 KiB, if anything, as `auto` says; yield those that do."""
    clock = Clock()
    made = schedule("auto", background=False, clock=clock)
    for step in steps:
        clock.now += seconds
        if train(made, step, 100 * KIB) == "now":
            yield step, made


def test_every_n_steps_and_those_that_are_looked_back_at_are_written(store: Store) -> None:
    made = schedule(3, last=11)
    assert [step for step in range(1, 12) if train(made, step, 10) == "now"] == [3, 5, 6, 9, 11]
    assert payloads() == "now", "outside of the steps everything is written"


def test_small_checkpoints_are_written_after_every_step(store: Store) -> None:
    made = schedule("auto")
    assert {train(made, step, 1000) for step in range(1, 10)} == {"now"}


def test_large_ones_take_a_twentieth_of_the_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "measured_rate", lambda store: 50 * KIB)  # two seconds for a checkpoint
    written = [step for step, _ in written_in(range(1, 31), seconds=10.0)]
    assert written == [1, 5, 9, 13, 17, 21, 25, 29], "every 40 seconds"


def test_checkpoints_beyond_a_tenth_of_the_disk_are_written_only_where_they_must(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "measured_rate", lambda store: 1e12)
    clock = Clock()
    made = schedule("auto", background=False, last=8, clock=clock)
    train(made, 1, 100 * KIB)
    clock.now = 1e6
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 1950 * KIB - 100 * KIB * len(made._there))
    assert [step for step in range(2, 9) if train(made, step, 100 * KIB) == "now"] == [5, 8]


def test_what_was_freed_since_makes_room_for_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "measured_rate", lambda store: 1e12)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 2000 * KIB)
    written = []
    for step, made in written_in(range(1, 5), seconds=1.0):
        written.append(step)
        if step == 2:
            store.prune(next(iter(made._there)))
    assert written == [1, 2, 3], "two are there at a time"


def test_large_checkpoints_are_written_in_the_background_but_for_the_last(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SMALL", 100)
    made = schedule(2, last=8)
    assert [train(made, step, 1000) for step in range(1, 9)] == [
        *("never", "now", "never", "background", "background", "background", "never", "now")
    ]
    assert schedule(1, background=False).when(3) == "now"


def test_the_rate_of_the_disk_is_measured_and_nothing_stays(store: Store) -> None:
    assert 1e5 < measured_rate(current_store()) < 1e12
    assert not list((store.root / "drafts").iterdir())


def test_a_disk_that_takes_nothing_stops_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "fsync", full)
    made = schedule("auto", background=False, last=8)
    assert [step for step in range(1, 9) if train(made, step, 100 * KIB) == "now"] == [1, 5, 8]


@pytest.mark.parametrize("every", [0, -1, 2.5, "often"])
def test_other_settings_are_refused_by_their_name(every: object) -> None:
    with pytest.raises((ConfigError, ValidationError), match=r"checkpoint\.every|every"):
        arithmetic_smoke().override({"checkpoint.every": every})


def test_it_is_neither_another_run_nor_another_key() -> None:
    config = arithmetic_smoke()
    assert config.override({"checkpoint.every": 7}).identity() == config.identity()
