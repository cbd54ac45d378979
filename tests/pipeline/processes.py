"""Forked processes that work at the same time, and waiting for what other processes do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")


def work_at_once(count: int, work: Callable[[int], object]) -> None:
    """Let `count` processes call `work` with their number at the same moment, and check that each ends well."""
    barrier = FORK.Barrier(count)

    def body(number: int) -> None:
        barrier.wait()
        work(number)
        os._exit(0)  # exit handlers of libraries that earlier tests loaded fail in a fork

    processes = [FORK.Process(target=body, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def until(condition: Callable[[], T | None], seconds: float) -> T:
    """Return what `condition` gives, once that is true; fail where it is not within these seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        time.sleep(0.05)
    return found


def await_end(pids: Iterable[int], seconds: float = 20.0) -> None:
    """Wait until none of the processes runs; a zombie does not run."""
    until(lambda: not any(_runs(pid) for pid in pids), seconds)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
