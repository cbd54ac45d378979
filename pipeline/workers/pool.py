"""Worker processes for code that may hang, crash or allocate without end: killed at a deadline, replaced, never awaited.

This is fault isolation, not a sandbox: the code runs with the user's rights. Nothing starts before the first `run`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

_MARK: Final = "COHORT_POOL_WORKER"
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
    """Set the limits of a fresh worker; imports come first, so that they count neither as memory nor as time of a task.

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
    """Return what the worker that runs this could not be limited to, in words."""
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
    """Return the class and the beginning of the text of an exception."""
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
    """Return the bytes of virtual memory this process has now; 0 where the system does not tell."""
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
    """Yield the living processes that belong to a worker, but this one."""
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


_TASKS_PER_WORKER: Final = 200
"""Then a worker is replaced: sympy's and antlr's caches grow."""
_GRACE_S: Final = 30.0
"""Silence beyond the deadlines after which the pool itself counts as broken (a worker needs seconds to start)."""


_OUT_OF_TIME: Final = Outcome(fault="lost", detail="worker ended by the system's limit of processor time")
"""`ulimit -t` counts all tasks of a worker: the one that it ended may be innocent, and is run once more."""


class KillablePool:
    """A pool in which a task that overruns is killed with its process, whatever it computes.

    Args:
        workers: processes side by side.
        memory_mb: address space a worker may add to what it has at its start.
        preload: modules imported once, in the server that workers are forked from. They must set what they need in the
            environment before they import heavy packages.
        prepare: called in every new worker before its limits apply, with the time that a start may take; what it raises is
            ignored: it can only make ready what the tasks would make themselves.
    """

    def __init__(
        self,
        *,
        workers: int,
        memory_mb: int,
        preload: Sequence[str] = (),
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.workers = workers
        self._memory_mb = memory_mb
        self._preload = tuple(preload)
        self._prepare = prepare
        self._turn = threading.Lock()
        self._pool: Any = None

    @property
    def started(self) -> bool:
        """Return whether worker processes have been started."""
        return self._pool is not None

    def run(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, deadline_s: float
    ) -> list[Outcome]:
        """Return one outcome per task, in order, always.

        Args:
            function: importable by name; what it returns must unpickle without running foreign code.
            tasks: its arguments, task by task.
            deadline_s: seconds a task may run, counted from its start in a worker. One that misses it is killed and not
                tried again; only a task that the pool itself lost is.
        """
        with self._turn:
            outcomes = self._attempt(function, tasks, deadline_s)
            for index, outcome in enumerate(outcomes):
                if outcome.fault == "lost":
                    again = self._attempt(function, [tasks[index]], deadline_s)[0]
                    # Alone in a fresh worker, the task itself takes that long.
                    outcomes[index] = replace(again, fault="crash") if again == _OUT_OF_TIME else again
            return outcomes

    def close(self) -> None:
        """Stop all workers; a later `run` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            atexit.unregister(self.close)
            pool.stop()
            pool.join()

    def _attempt(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> list[Outcome]:
        pool = self._ready()
        arguments = ((function, task, deadline_s) for task in tasks)
        futures = [pool.schedule(run_limited, args=each, timeout=deadline_s) for each in arguments]
        waiting = set(futures)
        # A pool that answers nothing for longer than any task may take is broken: its tasks are lost, not awaited.
        while waiting:
            done, waiting = wait(waiting, timeout=2 * deadline_s + _GRACE_S, return_when=FIRST_COMPLETED)
            if not done:
                self.close()
                break
        return [_outcome(future) for future in futures]

    def _ready(self) -> Any:
        if self._pool is not None and self._pool.active:
            return self._pool
        self.close()
        from pebble import CONSTS, ProcessPool

        # Pebble asks with SIGTERM before it kills; a worker inside one long C call cannot answer.
        CONSTS.term_timeout = 0.2
        # Never fork this process: it may hold CUDA and the locks of a hundred threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "pebble", *self._preload])  # a fork of it then starts in milliseconds
        self._pool = ProcessPool(
            max_workers=self.workers,
            max_tasks=_TASKS_PER_WORKER,
            initializer=prepare_worker,
            initargs=(self._memory_mb, self._preload, self._prepare),
            context=context,
        )
        atexit.register(self.close)
        self._probe()
        return self._pool

    def _probe(self) -> None:
        """Refuse workers that cannot start: they would be replaced for ever."""
        try:
            missing = self._pool.schedule(unenforced).result(timeout=4 * _GRACE_S)
        except Exception as error:
            self.close()
            raise RuntimeError(
                "worker processes do not start. A script that calls a flow at top level must do so under "
                "`if __name__ == '__main__':`, as worker processes import it again; a module that holds a function must "
                f"not work, wait or exit while it is imported.{_tight_limits()} ({type(error).__name__}: {error})"
            ) from error
        if missing:
            warnings.warn(f"worker processes run without: {'; '.join(missing)}", stacklevel=2)


def _tight_limits() -> str:
    """Return what the system allows a process here, where that may be too little for a worker."""
    kinds = {"ulimit -v": resource.RLIMIT_AS, "ulimit -t": resource.RLIMIT_CPU}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    said = [f"{name}: {limit}" for name, limit in found.items() if limit != resource.RLIM_INFINITY]
    return f" Limits of this process, which workers inherit: {', '.join(said)}." if said else ""


def _outcome(future: Any) -> Outcome:
    from concurrent.futures.process import BrokenProcessPool

    from pebble import ProcessExpired

    if not future.done():
        return Outcome(fault="lost", detail="the worker pool stopped answering")
    try:
        returned: Outcome = future.result()
        return returned
    except FutureTimeoutError:
        return Outcome(fault="timeout", detail="killed at the deadline")
    except ProcessExpired as error:
        _, limit = resource.getrlimit(resource.RLIMIT_CPU)
        if limit != resource.RLIM_INFINITY and error.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return _OUT_OF_TIME
        return Outcome(fault="crash", detail=f"worker exited with code {error.exitcode}")
    except BrokenProcessPool as error:
        return Outcome(fault="lost", detail=str(error))
    except Exception as error:  # a result that cannot be sent belongs to its row, never to the batch
        return Outcome(fault="error", detail=named(error))
