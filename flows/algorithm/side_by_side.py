"""Sample and update at a time (`side_by_side`): whether this machine can, and the thread in which the sampling is waited for.

The two sides meet in the store alone, so that the order in which they end changes no result.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from flows.config import IterativeRLConfig
from flows.config.combinations import unfit_side_by_side
from pipeline.config import ConfigError
from pipeline.orchestration.interruption import check
from pipeline.store.context import computing_apart
from stages.rollout import HFBackendConfig
from stages.training import DeepSpeedEngineConfig
from stages.training.hardware import cores, has_cuda, within_quota

T = TypeVar("T")

_TICK: Final = 0.1
"""Seconds between two looks at whether the run was interrupted."""


class Concurrent(Generic[T]):
    """Work in a thread, and in processes that stages have of their own, while this thread goes on."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Start, and return once trained state that may change has been read."""
        self._done: T | None = None
        self._error: BaseException | None = None
        read = threading.Event()

        def run() -> None:
            try:
                with computing_apart(read.set):
                    self._done = work()
            except BaseException as error:
                self._error = error
            finally:
                read.set()

        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="sampling")
        self._thread.start()
        try:
            while not read.wait(_TICK):
                check()
        except BaseException as error:
            self.stop(type(error).__name__)
            raise

    def result(self) -> T:
        """Wait, and return what came of it; raise what it failed with."""
        while self._thread.is_alive():
            self._thread.join(_TICK)
            check()
        if self._error is not None:
            raise self._error
        assert self._done is not None
        return self._done

    def stop(self, reason: str) -> None:
        """End it, with what its process computes; calls that were recorded stay so."""
        if self._thread.is_alive():
            from stages.rollout.apart import stop_sampler

            stop_sampler(reason)
            self._thread.join()


def runs_side_by_side(config: IterativeRLConfig) -> bool:
    """Return whether outputs are sampled while the policy is updated (`side_by_side`).

    Raises:
        ConfigError: they are to be, and this machine has no room for both.
    """
    if not config.overlap or config.side_by_side == "never":
        return False
    complaint = "on GPUs the two run in turns" if has_cuda() else ""
    complaint = next(unfit_side_by_side(config), complaint) or _without_room(config, within_quota(cores()))
    if complaint and config.side_by_side == "always":
        raise ConfigError(f"side_by_side: {complaint}; set side_by_side=auto, or never")
    return not complaint


def samples_concurrently(config: IterativeRLConfig, *, cores: int) -> bool:
    """Return whether outputs are sampled while the policy is updated, on another machine with so many cores and no GPU."""
    wanted = config.overlap and config.side_by_side != "never" and not any(unfit_side_by_side(config))
    return bool(wanted) and not _without_room(config, cores)


def _without_room(config: IterativeRLConfig, there: int) -> str:
    """Say why so many cores are too few for both; empty: they are not."""
    backend, training = config.rollout.backend, config.update.training
    assert isinstance(backend, HFBackendConfig)
    assert backend.threads != "auto"
    assert training.threads != "auto"
    ranks = training.engine.ranks if isinstance(training.engine, DeepSpeedEngineConfig) else 1
    used = backend.threads + ranks * training.threads
    if there >= used:
        return ""
    return f"{used} threads (rollout.backend, update.training) need as many cores, found {there}"
