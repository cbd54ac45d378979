"""Report live progress from stages to displays, and keep an error of a display from the work.

A report is free-form: a topic and named values, `report("sft", done=120, total=600, loss=0.31)`.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pipeline.orchestration.interruption import check

Listener = Callable[[str, dict[str, Any]], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("cohort_listeners", default=())
_written: set[str] = set()
"""Warnings of `warn_plainly`."""


def report(topic: str, **values: Any) -> None:
    """Report progress to every listener; one that fails costs a warning, never the work.

    Raise KeyboardInterrupt where the run was interrupted and the exception was lost on its way.
    """
    check()
    for listener in _listeners.get():
        with failsafe(f"a listener of {topic!r}"):
            listener(topic, dict(values))


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(topic, values)` for every report made inside the block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def failsafe(what: str, *, passing: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Run something that only shows or follows the work: a display, a plot, a table, a tracker.

    An `Exception` inside the block ends the block, not the work: it becomes one warning that names `what` and the line.
    Interrupts and `passing` are raised. Also a decorator of functions that return None.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        _warn(describe_failure(what, error))


def describe_failure(what: str, error: Exception) -> str:
    """Return one line that says what failed, how and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{what} failed and is left out, the work goes on: {type(error).__name__}: {error}{place}"


def warn_plainly(text: str) -> None:
    """Write a warning to standard error, once per process: for what shows warnings when it is itself at fault."""
    if text in _written or sys.stderr is None:
        return
    _written.add(text)
    with contextlib.suppress(Exception):  # a terminal that is gone, a display in its place: nowhere is left
        print(f"warning: {text}", file=sys.stderr)


def _warn(text: str) -> None:
    try:
        warnings.warn(text, stacklevel=1)  # from here: whoever asked is in the text
    except Exception:
        warn_plainly(text)
