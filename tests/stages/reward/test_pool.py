"""The pool: what hangs, crashes, raises or allocates costs its own row and nothing else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from stages.reward.pool import KillablePool, Outcome
from tests.stages.reward.tasks import double, misbehave

MIB = 2**20


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


def test_the_deadline_is_total_and_a_task_that_misses_it_is_not_tried_again(pool: KillablePool) -> None:
    pool.run(double, [(1,)], deadline_s=20)
    started = time.perf_counter()
    assert [o.fault for o in pool.run(time.sleep, [(30,)], deadline_s=1.0)] == ["timeout"]
    assert 1.0 < time.perf_counter() - started < 2.0


def test_a_worker_that_was_killed_is_replaced_within_the_second(pool: KillablePool) -> None:
    for _ in range(3):
        started = time.perf_counter()
        assert pool.run(misbehave, [("hang",), ("hang",)], deadline_s=0.5)[0].fault == "timeout"
        assert time.perf_counter() - started < 1.5


def test_what_a_task_raises_stays_text_whatever_its_class(pool: KillablePool) -> None:
    outcomes = pool.run(misbehave, [("raise unknown",), ("exit",), ("raise mute",)], deadline_s=20)
    assert [o.fault for o in outcomes] == ["error"] * 3
    assert [o.detail for o in outcomes] == ["Unknown: of this process only", "SystemExit: 3", "MuteError"]


def test_a_result_that_cannot_be_sent_is_an_error_of_its_row(pool: KillablePool) -> None:
    outcomes = pool.run(misbehave, [("return a lock",), ("fine",)], deadline_s=20)
    assert [o.fault for o in outcomes] == ["error", None]


def test_a_worker_that_allocates_without_end_stays_under_its_limit(pool: KillablePool) -> None:
    pool.run(double, [(1,)] * 4, deadline_s=20)
    mapped, resident = _memory()
    highest = [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[:] = map(max, highest, _memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = pool.run(misbehave, [("allocate slowly",), ("allocate slowly",), ("fine",)], deadline_s=20)
    done.set()
    watcher.join()
    assert [o.fault for o in outcomes] == ["memory", "memory", None]
    assert mapped + 200 * MIB < highest[0] <= mapped + 256 * MIB
    # A fork maps pages of its server only when it touches them: these come on top of what it allocates itself.
    assert resident + 200 * MIB < highest[1] < resident + 320 * MIB


def _memory() -> tuple[int, int]:
    """Largest address space and largest resident memory of the processes below this one, in bytes."""
    mapped, resident = [0], [0]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.memory_info()
            mapped.append(found.vms)
            resident.append(found.rss)
    return max(mapped), max(resident)


def test_the_pool_works_off_the_main_thread(pool: KillablePool) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(pool.run(double, [(4,)], deadline_s=20)))
    thread.start()
    thread.join(60)
    assert found == [Outcome(8)]
