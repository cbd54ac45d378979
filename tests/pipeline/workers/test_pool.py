"""The pool: what hangs, crashes, raises or allocates costs its own row and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.workers import pool as pool_module
from pipeline.workers.pool import _OUT_OF_TIME, KillablePool, Outcome
from stages.reward.rules.accuracy import VerifierLostError, grade_answers
from tests.pipeline.processes import await_end
from tests.pipeline.workers.tasks import double, misbehave, note_and_hang, signal_its_group, start_a_program

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


@pytest.mark.claim("two rewards for one output, or none")
def test_every_task_has_its_outcome_in_order(pool: KillablePool) -> None:
    assert [o.value for o in pool.run(double, [(i,) for i in range(20)], deadline_s=20)] == list(range(0, 40, 2))


@pytest.mark.claim("a verifier that hangs")
def test_each_fault_stays_in_its_row_and_the_pool_goes_on(pool: KillablePool) -> None:
    tasks = ["fine", "hang", "crash", "allocate", "raise", "fine too"]
    outcomes = pool.run(misbehave, [(task,) for task in tasks], deadline_s=1.0)
    assert [o.fault for o in outcomes] == [None, "timeout", "crash", "memory", "error", None]
    assert (outcomes[0].value, outcomes[5].value) == ("fine", "fine too")
    assert outcomes[4].detail == "ValueError: no such luck"
    assert pool.run(double, [(21,)], deadline_s=20) == [Outcome(42)]


def test_a_task_that_misses_its_deadline_is_not_tried_again(pool: KillablePool, tmp_path: Path) -> None:
    assert [o.fault for o in pool.run(note_and_hang, [(str(tmp_path / "notes"),)], deadline_s=1.0)] == ["timeout"]
    assert (tmp_path / "notes").read_text() == "begun\n"


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


@pytest.mark.claim("a verifier that hangs")
def test_the_pool_works_off_the_main_thread(pool: KillablePool) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(pool.run(double, [(4,)], deadline_s=20)))
    thread.start()
    thread.join(60)
    assert found == [Outcome(8)]


# ------------------------------------------------------------------------------------- what a task does to others


def test_a_signal_to_its_process_group_ends_a_worker_and_nothing_else(pool: KillablePool) -> None:
    tasks = [(signal.SIGKILL,), (signal.SIGTERM,)]
    assert [o.fault for o in pool.run(signal_its_group, tasks, deadline_s=20)] == ["crash", "crash"]
    assert pool.run(double, [(3,)], deadline_s=20) == [Outcome(6)]


@pytest.mark.skipif(sys.platform != "linux", reason="found in /proc")
@pytest.mark.parametrize("how", ["plain", "new session", "fork"])
def test_what_a_task_started_ends_with_its_worker(how: str) -> None:
    made = KillablePool(workers=1, memory_mb=256)
    [started] = made.run(start_a_program, [(how,)], deadline_s=20)
    assert psutil.pid_exists(started.value), "a task may start what the next one uses"
    made.close()
    await_end([started.value])


@pytest.mark.skipif(sys.platform != "linux", reason="found in /proc")
def test_what_a_task_started_ends_with_a_run_that_was_killed() -> None:
    code = """
import os, signal
from pipeline.workers.pool import KillablePool
from tests.pipeline.workers.tasks import start_a_program
if __name__ == "__main__":
    print(KillablePool(workers=1, memory_mb=256).run(start_a_program, [("plain",)], deadline_s=20)[0].value, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = _python(code)
    assert done.returncode == -signal.SIGKILL
    await_end([int(done.stdout)])


# ------------------------------------------------------------------------------------- limits of the system


def test_limits_of_the_system_are_kept_and_tasks_print_to_stderr() -> None:
    code = """
import resource
for kind, amount in ((resource.RLIMIT_AS, 6 * 2**30), (resource.RLIMIT_CPU, 21)):
    resource.setrlimit(kind, (amount, amount))
from pipeline.workers.pool import KillablePool
from tests.pipeline.workers.tasks import say
if __name__ == "__main__":
    pool = KillablePool(workers=1, memory_mb=8192)
    print([o.value for o in pool.run(say, [(2,), (3,)], deadline_s=20)])
    pool.close()
"""
    done = _python(code)
    assert done.stdout == "[2, 3]\n", done.stderr
    assert "printed by a task" in done.stderr
    assert "written by a task" in done.stderr
    assert re.search(r"UserWarning: .*8192 MiB .*6442450944\); .*21 s, `ulimit -t`", done.stderr)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("error", [ValueError("current limit exceeds maximum limit"), PermissionError(1, "refused")])
def test_a_limit_that_the_system_refuses_is_named_and_the_worker_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    noted: list[str] = []
    monkeypatch.setattr(pool_module, "_not_enforced", noted)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    pool_module._limit(resource.RLIMIT_AS, 2**30, "memory of 1024 MiB")
    assert pool_module.unenforced() == [f"memory of 1024 MiB ({type(error).__name__}: {error})"]
    assert pool_module.run_limited(double, (4,), 1.0) == Outcome(8)


# ------------------------------------------------------------------------------------- tasks that are lost


class Losing:
    """A process pool of this process that loses some tasks: it says that it broke, or never answers."""

    def __init__(self, lost: Collection[int], *, says: bool) -> None:
        self.lost, self.says = lost, says
        self.asked: list[int] = []

    def schedule(self, function: Any, args: tuple[Any, tuple[int], float], timeout: float) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        ((number,), work) = args[1], args[0]
        self.asked.append(number)
        if number not in self.lost:
            future.set_result(Outcome(work(number)))
        elif self.says:
            future.set_exception(BrokenProcessPool("the pool is gone"))
        return future


class LostPool(KillablePool):
    """Loses whatever it is given."""

    def _attempt(self, function: Any, tasks: Sequence[tuple[Any, ...]], deadline_s: float) -> list[Outcome]:
        return [self.outcome] * len(tasks)

    outcome = Outcome(fault="lost", detail="the pool is gone")


def test_a_comparison_whose_worker_is_lost_twice_is_no_verdict() -> None:
    pairs, lost = [("\\sqrt{2}", "\\boxed{2^{1/2}}")], LostPool(workers=1, memory_mb=256)
    with pytest.raises(VerifierLostError, match="the pool is gone"):
        grade_answers(pairs, conventions=("boxed",), verifier="math_verify", pool=lost, deadline_s=1.0)


def test_a_task_that_uses_up_the_systems_processor_time_is_not_retried() -> None:
    greedy = LostPool(workers=1, memory_mb=256)
    greedy.outcome = _OUT_OF_TIME
    assert [outcome.fault for outcome in greedy.run(double, [(1,)], deadline_s=1.0)] == ["crash"]


@pytest.mark.parametrize("says", [True, False], ids=["the pool breaks", "the pool is silent"])
@pytest.mark.parametrize(
    ("lost", "again", "faults"),
    [
        ({2, 4}, set(), [None] * 5),
        ({1, 2, 3, 4, 5}, set(), [None] * 5),
        ({2, 4}, {4}, [None, None, None, "lost", None]),
    ],
    ids=["some", "all", "one twice"],
)
def test_tasks_that_the_pool_lost_are_run_once_more_and_no_others(
    lost: set[int], again: set[int], faults: list[str | None], says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.workers.pool._GRACE_S", 0.01)
    made = KillablePool(workers=1, memory_mb=256)
    first, second = Losing(lost, says=says), Losing(again, says=says)
    pools = iter([first])
    monkeypatch.setattr(made, "_ready", lambda: next(pools, second))
    outcomes = made.run(double, [(number,) for number in range(1, 6)], deadline_s=0.01)
    assert [outcome.fault for outcome in outcomes] == faults
    assert [outcome.value for outcome in outcomes] == [
        None if fault else 2 * number for number, fault in enumerate(faults, 1)
    ]
    assert (first.asked, second.asked) == ([1, 2, 3, 4, 5], sorted(lost))
