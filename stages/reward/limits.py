"""A worker process of the pool from inside: its limits, its process group, and the end of whatever it starts."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["Fault", "Outcome", "named", "prepare_worker", "run_limited", "unenforced"]

_MARK: Final = "COHORT_REWARD_WORKER"
"""Variable by which programs that a worker starts are found again, whatever session they are in."""
_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG."""
_SWEEPS: Final = 50
"""How often what a dead worker left is looked for: each time it may have forked again."""

Fault = Literal["timeout", "memory", "crash", "error", "lost"]

_not_enforced: list[str] = []
"""What this worker could not be limited to."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its value, or the fault that took it."""

    value: Any = None
    fault: Fault | None = None
    detail: str = ""


def prepare_worker(memory_mb: int, preload: Sequence[str], prepare: Callable[[], object] | None) -> None:
    """Limits of a fresh worker; imports come first, so that they count neither as memory nor as time of a task.

    A worker has a session of its own: a signal that it sends to its process group ends nothing of the run.
    """
    os.dup2(2, 1)  # whatever a task prints is a message: stdout belongs to the command that was called
    with contextlib.suppress(OSError):
        os.setsid()
    _die_with_parent(signal.SIGKILL)  # the fork server dies with its parent, and workers with it
    _watch_over_children()
    for module in preload:
        importlib.import_module(module)
    if prepare is not None:
        with contextlib.suppress(Exception, SystemExit):
            prepare()
    _limit(resource.RLIMIT_CORE, 0, "no core files")
    _limit(resource.RLIMIT_AS, _address_space() + memory_mb * 2**20, f"memory of {memory_mb} MiB", final=True)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        _not_enforced.append(
            f"processor time by the deadline alone (the system ends a worker after {hard} s, `ulimit -t`)"
        )


def unenforced() -> list[str]:
    """What the worker that runs this could not be limited to, in words."""
    return list(_not_enforced)


def run_limited(function: Callable[..., Any], task: tuple[Any, ...], deadline_s: float) -> Outcome:
    """Run in the worker; the CPU limit is for the case that no process is left to enforce the deadline.

    An exception becomes text here: its class might exist in the worker only, and unpickling it would break the pool.
    """
    seconds = math.ceil(time.process_time() + deadline_s * (os.cpu_count() or 1)) + 2
    _limit(resource.RLIMIT_CPU, seconds)
    try:
        return Outcome(value=function(*task))
    except MemoryError:
        return Outcome(fault="memory", detail="memory limit reached")
    except BaseException as error:  # `exit()` in a task is an error of its row as well
        return Outcome(fault="error", detail=named(error))


def named(error: BaseException) -> str:
    """Class and beginning of the text of an exception."""
    try:
        return f"{type(error).__name__}: {str(error)[:200]}"
    except Exception:  # an exception whose text raises
        return type(error).__name__


def _limit(kind: int, amount: int, meant: str = "", *, final: bool = False) -> None:
    """Set a soft limit, at most to the hard one that the system has set; note what was `meant` where that cannot be."""
    try:
        _, hard = resource.getrlimit(kind)
        reached = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (reached, reached if final else hard))
        reason = "" if reached == amount else f"the system's own limit is lower: {hard}"
    except (OSError, ValueError) as error:
        reason = named(error)
    if meant and reason:
        _not_enforced.append(f"{meant} ({reason})")


def _address_space() -> int:
    """Bytes of virtual memory this process has now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


# ------------------------------------------------------------------------------------------------ what a worker starts


def _die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, number)


def _watch_over_children() -> None:
    """Fork a process that waits for this one to end, however it does, and ends what it has started (Linux).

    What is found: every process of this one's session, and every program that has the mark in its environment.
    """
    if sys.platform != "linux":
        return
    worker, mark = os.getpid(), uuid.uuid4().hex
    os.environ[_MARK] = mark
    try:
        if os.fork():
            return
    except OSError as error:
        _not_enforced.append(f"the end of processes that a task starts ({named(error)})")
        return
    try:
        os.setsid()
        os.closerange(0, 2**20)  # the pool's pipes have to end with the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        _die_with_parent(signal.SIGUSR1)
        if os.getppid() == worker:
            signal.sigwait({signal.SIGUSR1})
        for _ in range(_SWEEPS):
            left = list(_started_by(worker, mark))
            for process in left:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.02)
    finally:
        os._exit(0)


def _started_by(worker: int, mark: str) -> Iterator[int]:
    """Living processes that belong to a worker, not this one."""
    wanted = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command's name, in parentheses, may hold anything: fields are counted from behind it.
            state, _, _, session = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            if state not in "ZX" and (
                int(session) == worker or wanted in (folder / "environ").read_bytes().split(b"\0")
            ):
                yield int(folder.name)
