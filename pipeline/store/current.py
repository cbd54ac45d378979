"""Which store the stages of this context use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from pipeline.store.files import StoreError

if TYPE_CHECKING:
    from pipeline.store.store import Store

__all__ = ["current_store", "use_store"]

_current: ContextVar[Store | None] = ContextVar("cohort_store", default=None)


def current_store() -> Store:
    """The store that stages use here.

    Raises:
        StoreError: none was chosen.
    """
    store = _current.get()
    if store is None:
        raise StoreError("no store is open; wrap the call in `with use_store(Store(folder)):`")
    return store


@contextlib.contextmanager
def use_store(store: Store) -> Iterator[Store]:
    """Make `store` the one that stages use inside the block."""
    token = _current.set(store)
    try:
        yield store
    finally:
        _current.reset(token)
