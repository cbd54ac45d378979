"""The context in which flows and stages run: the engine, the store, the watch over the disk, and the call in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal

from pipeline.store.actions import key_of
from pipeline.store.files import DiskWatch, StoreError
from pipeline.store.store import Store

Engine = Literal["inline", "prefect"]
Payloads = Literal["now", "background", "never"]

_METRIC_NAME: Final = re.compile(r"[A-Za-z0-9_\-. :/]+")
"""What MLflow accepts."""
_PACKAGES: Final = ("torch", "transformers", "deepspeed", "vllm", "pyarrow", "numpy", "math-verify", "cohort-rl")
"""The packages that decide numbers."""


@dataclasses.dataclass
class Call:
    """A call of a stage: its identity and what it recorded so far."""

    stage: str
    version: str
    arguments: dict[str, Any]
    started: float = dataclasses.field(default_factory=time.time)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    remedy: str = ""
    """What to do for equal bits, where the call may come to others when it is made again."""

    @property
    def key(self) -> str:
        """Return the cache key, which is the name of trained state that the call makes."""
        return key_of(self.stage, self.version, self.arguments)

    def provenance(self) -> dict[str, Any]:
        """Return plain JSON for manifests and action records."""
        return {
            "stage": self.stage,
            "version": self.version,
            "arguments": self.arguments,
            "metrics": dict(self.metrics),
            "created": self.started,
            "packages": package_versions() | self.packages,
        }


@dataclasses.dataclass(frozen=True)
class _Context:
    engine: Engine | Literal["joined"] = "inline"
    """`joined`: Prefect, as part of the flow run that is there."""
    store: Store | None = None
    watch: DiskWatch | None = None
    call: Call | None = None
    payloads: Payloads = "now"
    reads_done: Callable[[], None] | None = None


_context: ContextVar[_Context] = ContextVar("cohort_context", default=_Context())  # noqa: B039 (it is frozen)


@contextlib.contextmanager
def _changed(**parts: Any) -> Iterator[None]:
    token = _context.set(dataclasses.replace(_context.get(), **parts))
    try:
        yield
    finally:
        _context.reset(token)


def current_engine() -> Engine | Literal["joined"]:
    """Return the engine that flows run on here."""
    return _context.get().engine


def use_engine(engine: Engine | Literal["joined"]) -> contextlib.AbstractContextManager[None]:
    """Run the flows called inside the block on `engine`."""
    return _changed(engine=engine)


def current_store() -> Store:
    """Return the store that stages use here; raise StoreError where none was chosen."""
    store = _context.get().store
    if store is None:
        raise StoreError("no store is open; wrap the call in `with use_store(Store(folder)):`")
    return store


@contextlib.contextmanager
def use_store(store: Store) -> Iterator[Store]:
    """Make `store` the one that stages use inside the block."""
    with _changed(store=store):
        yield store


def current_watch() -> DiskWatch | None:
    """Return what watches the disk here."""
    return _context.get().watch


@contextlib.contextmanager
def watching_disk(watch: DiskWatch) -> Iterator[DiskWatch]:
    """Let stages that run inside the block ask `watch` before they start."""
    with _changed(watch=watch):
        yield watch


def current_call() -> Call | None:
    """Return the stage call in progress; None outside of one."""
    return _context.get().call


def payloads() -> Payloads:
    """Return when stages write the trained state that they make; what describes it is always written."""
    return _context.get().payloads


def writing_payloads(when: Payloads) -> contextlib.AbstractContextManager[None]:
    """Let stages inside the block write the trained state that they make at this time."""
    return _changed(payloads=when)


def computing_apart(reads_done: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Let stages inside the block that can, compute in a process of their own.

    Args:
        reads_done: called once such a stage has a copy of the trained state that it was given, which may change then.
    """
    return _changed(reads_done=reads_done)


def reads_done() -> Callable[[], None] | None:
    """Return what to call once a stage has read trained state, where it is to compute in a process of its own; else None."""
    return _context.get().reads_done


def running(call: Call | None) -> contextlib.AbstractContextManager[None]:
    """Make `call` the call in progress inside the block."""
    return _changed(call=call)


def current_provenance() -> dict[str, Any] | None:
    """Return the provenance of the stage call in progress; None outside of one."""
    call = current_call()
    return call.provenance() if call else None


def record_metrics(metrics: Mapping[str, float | int | bool | None]) -> None:
    """Keep numbers with the artifact that the running stage makes; a cached call draws the same curves from them.

    None means "not measured" and is left out. A value that is not finite is left out and counted in `nonfinite_metrics`,
    since MLflow stores infinity as a number. Outside a stage this does nothing.

    Raises:
        ValueError: a name with characters other than letters, digits, `_-. :/`.
    """
    call = current_call()
    for name, value in metrics.items():
        if not _METRIC_NAME.fullmatch(name):
            raise ValueError(f"metric name {name!r}: expected letters, digits and _-. :/ only")
        if call is None or value is None:
            continue
        if math.isfinite(value):
            call.metrics[name] = float(value)
        else:
            call.metrics["nonfinite_metrics"] = call.metrics.get("nonfinite_metrics", 0.0) + 1.0


def record_package(name: str, version: str) -> None:
    """Keep the version of a package that made the running stage's result in another process. Outside a stage: nothing."""
    call = current_call()
    if call is not None:
        call.packages[name] = version


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide numbers, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
