"""Where the seconds of a step go: named functions are timed, each without what others among them take inside it."""

from __future__ import annotations

import functools
import importlib
import inspect
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

__all__ = ["Clock", "Device", "cpu_seconds"]


def cpu_seconds() -> float:
    """Processor time of this process, all its threads: less sensitive to what else the machine does than wall time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Device:
    """The CUDA device of this process, where there is one."""

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda if torch.cuda.is_available() else None

    def begin(self) -> None:
        """A step begins."""
        if self._cuda:
            self._cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        """Wait until it has computed what it was given."""
        if self._cuda:
            self._cuda.synchronize()

    def peak_mib(self) -> float:
        """The most that tensors took of it since the step began; 0 without one."""
        return float(self._cuda.max_memory_allocated()) / 2**20 if self._cuda else 0.0


class Clock:
    """Exclusive wall seconds by phase."""

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        """Args:
        settle: called before every look at the clock.
        """
        self._settle = settle
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def watch(self, phase: str | Callable[..., str], owner: object, name: str) -> None:
        """Book the time of `owner.name(...)`, less the time of watched calls inside it, under `phase`.

        Args:
            phase: a name, or a function from the call's arguments to one.
        """
        held = inspect.getattr_static(owner, name)
        function: Callable[..., Any] = held.__func__ if isinstance(held, classmethod) else getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            self._settle()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._settle()
                took = time.perf_counter() - started
                self.seconds[phase if isinstance(phase, str) else phase(*args, **kwargs)] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, name, classmethod(timed) if isinstance(held, classmethod) else timed)

    def watch_path(self, phase: str, path: str) -> None:
        """`watch` for `module:attribute` or `module:Class.method`."""
        module, names = path.split(":")
        *outer, name = names.split(".")
        self.watch(phase, functools.reduce(getattr, outer, importlib.import_module(module)), name)

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
