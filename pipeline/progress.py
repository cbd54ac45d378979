"""Live progress: stages report, whoever displays listens.

A report is free-form: a topic and named values, `report("sft", done=120, total=600, loss=0.31)`. Without a listener it costs
a dictionary look-up.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from pipeline.interruption import check

__all__ = ["listen", "report"]

Listener = Callable[[str, dict[str, Any]], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("cohort_listeners", default=())


def report(topic: str, **values: Any) -> None:
    """Tell every listener where a piece of work stands; one that fails costs a warning, never the work.

    Raises:
        KeyboardInterrupt: the run was interrupted, and the exception was lost on its way.
    """
    check()
    for listener in _listeners.get():
        try:
            listener(topic, dict(values))
        except Exception as error:
            warnings.warn(
                f"the listener {listener!r} failed on {topic!r}: {type(error).__name__}: {error}", stacklevel=2
            )


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(topic, values)` for every report made inside the block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
