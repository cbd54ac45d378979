"""The pool: what hangs, crashes, raises or allocates costs its own row and nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from stages.reward.pool import KillablePool, Outcome


def double(x: int) -> int:
    return 2 * x


def misbehave(how: str) -> str:
    match how:
        case "hang":
            while True:
                pass
        case "crash":
            os.abort()
        case "allocate":
            return str(len(bytearray(8 * 2**30)))
        case "raise":
            raise ValueError("no such luck")
        case _:
            return how


@pytest.fixture(scope="module")
def pool() -> Iterator[KillablePool]:
    made = KillablePool(workers=2, memory_mb=256)
    yield made
    made.close()


def test_nothing_starts_before_the_first_task() -> None:
    made = KillablePool(workers=2, memory_mb=256)
    assert not made.started
    made.close()


def test_every_task_has_its_outcome_in_order(pool: KillablePool) -> None:
    assert [o.value for o in pool.run(double, [(i,) for i in range(20)], deadline_s=20)] == list(range(0, 40, 2))


def test_each_fault_stays_in_its_row_and_the_pool_goes_on(pool: KillablePool) -> None:
    tasks = ["fine", "hang", "crash", "allocate", "raise", "fine too"]
    outcomes = pool.run(misbehave, [(task,) for task in tasks], deadline_s=1.0)
    assert [o.fault for o in outcomes] == [None, "timeout", "crash", "memory", "error", None]
    assert (outcomes[0].value, outcomes[5].value) == ("fine", "fine too")
    assert outcomes[4].detail == "ValueError: no such luck"
    assert pool.run(double, [(21,)], deadline_s=20) == [Outcome(42)]


def test_a_task_that_was_only_slow_is_answered_by_the_second_try(pool: KillablePool) -> None:
    # Sleeping 1.5 s misses 1 s and meets the 2 s it gets alone.
    started = time.perf_counter()
    outcomes = pool.run(time.sleep, [(1.5,)], deadline_s=1.0)
    assert outcomes == [Outcome(None)]
    assert time.perf_counter() - started > 2.0


def test_the_pool_works_off_the_main_thread(pool: KillablePool) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(pool.run(double, [(4,)], deadline_s=20)))
    thread.start()
    thread.join(60)
    assert found == [Outcome(8)]
