"""Keep heavy objects in memory between stage calls: an engine is a cache, not state.

A resident object can always be made again from artifacts. It must say itself which artifact it holds (and that it holds none
while it changes), so that a stage that failed half-way is never mistaken for one that finished.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")

_residents: dict[str, tuple[Hashable, Any]] = {}


def resident(slot: str, key: Hashable, make: Callable[[], T]) -> T:
    """Return the object in `slot` if it was made for `key`; otherwise free the old one, then `make()` its successor."""
    if slot in _residents and _residents[slot][0] == key:
        return cast(T, _residents[slot][1])
    evict(slot)
    made = make()
    _residents[slot] = (key, made)
    return made


def kept(slot: str, key: Hashable) -> Any | None:
    """Return the object in `slot` if it was made for `key`; None where there is none."""
    return _residents[slot][1] if slot in _residents and _residents[slot][0] == key else None


class Holder(Protocol):
    """A resident that has trained state in memory, and can write it."""

    def has(self, state: str) -> bool:
        """Return whether it has what `Artifact.state` names."""
        ...

    def write(self, name: str) -> None:
        """Write what it has as the artifact `name`, of which only the description is in the store.

        Raises:
            MissingArtifactError: it has it no longer.
        """
        ...


def holder_of(state: str) -> Holder | None:
    """Return the resident that has trained state in memory and can write it; None: there is none."""
    for _, kept in _residents.values():
        if hasattr(kept, "has") and kept.has(state):
            return cast(Holder, kept)
    return None


def evict(slot: str | None = None) -> None:
    """Free the object in `slot`, or all; one with a `close()` method is closed."""
    names = [name for name in (list(_residents) if slot is None else [slot]) if name in _residents]
    for name in names:
        _, kept = _residents.pop(name)
        close = getattr(kept, "close", None)
        if callable(close):
            close()
        del kept, close
    if names:
        gc.collect()
