"""Forked processes that work at the same time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

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
