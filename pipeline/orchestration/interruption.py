"""Let SIGINT, SIGTERM and SIGHUP end a command wherever they arrive, and never lose one.

A signal handler's exception disappears where Python ignores exceptions: in `__del__`, in callbacks of weak references and of
the garbage collector, in a library's `except BaseException`. The handler therefore notes the signal before it raises
`KeyboardInterrupt`, and the note is read again: `check` raises at stages, progress reports and micro-batches, and the handler
is called every half second until the exception travels.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOT_OURS: Final = (signal.SIG_IGN, None)
"""Handlers that are kept: signals to be ignored, and handlers that Python cannot put back."""
_REMIND_SECONDS: Final = 0.5
_PATIENCE: Final = 3
"""The signal that ends the process at once: the first unwinds the command, the second cuts the unwinding short."""


class _State:
    """The signals since the last `interruptible` block began."""

    def __init__(self) -> None:
        self.open = False
        """Whether the block is running."""
        self.first = 0
        """The signal that asked for the end; 0: none did."""
        self.count = 0
        """Signals from outside."""
        self.reminds = False
        """The next call of the handler comes from `_remind`, not from outside."""
        self.shields = 0
        self.raised: list[BaseException] = []
        # A lock inside a handler may be one that the interrupted code holds; `SimpleQueue.put` is reentrant.
        self.wake: queue.SimpleQueue[bool] = queue.SimpleQueue()


_state = _State()


def check() -> None:
    """Raise KeyboardInterrupt where a signal was noted and its exception is not on its way. Costs nanoseconds.

    Call it between micro-batches, stages and requests: wherever work may stop.
    """
    if _state.first and _state.open and not _state.shields and not _travels():
        raise _interrupt()


def is_interruption(error: BaseException) -> bool:
    """Return whether an error ends a run because it was stopped from outside, whatever the exception became on its way.

    A closed terminal sends SIGHUP, and from then on every line that is printed raises OSError.
    """
    prefects = type(error).__name__ == "TerminationSignal"
    return bool(_state.first) or isinstance(error, KeyboardInterrupt) or prefects


def exit_code() -> int:
    """Return the exit code of an interrupted command: 129 for SIGHUP, else 130."""
    return 128 + (signal.SIGHUP if _state.first == signal.SIGHUP else signal.SIGINT)


def settle() -> None:
    """Forget the signal: the command heard it and ends in its own way, which is not interrupted again."""
    _state.first = 0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP interrupt what runs inside the block.

    A block inside another takes the signals back from code that caught them in between, as Prefect's flows do. A signal that
    was ignored from the start stays so (`nohup`, background jobs of a script). Only the main thread can have handlers: in
    another one the block does nothing.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = not _state.open
    if outermost:
        _state = _State()
        threading.Thread(target=_remind, args=(_state,), name="interruption", daemon=True).start()
        _state.open = True
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) not in _NOT_OURS}
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        if outermost:
            _state.open = False
            _state.wake.put(False)
            _state.raised.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Note signals inside the block and raise after it: for the milliseconds in which a run's record is written."""
    state = _state
    state.shields += 1
    try:
        yield
    finally:
        state.shields -= 1
    check()


def _handle(number: int, frame: FrameType | None) -> None:
    state = _state
    reminded, state.reminds = state.reminds, False
    if not reminded:
        state.count += 1
        if state.count >= _PATIENCE:
            os._exit(exit_code())
        if not state.first:
            state.first = number
            state.wake.put(True)
    elif _travels():
        return
    if state.first and not state.shields and not _finalises(frame):
        raise _interrupt()


def _finalises(frame: FrameType | None) -> bool:
    """Return whether a signal came inside a `__del__`, where an exception would be printed and ignored."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _remind(state: _State) -> None:
    """Call the handler again and again once a signal came: its exception may have been ignored."""
    main = threading.main_thread().ident
    assert main is not None
    if not state.wake.get():
        return
    while state.open:
        time.sleep(_REMIND_SECONDS)
        if state.open and state.first and not state.shields:
            state.reminds = True
            signal.pthread_kill(main, state.first)


def _interrupt() -> KeyboardInterrupt:
    error = KeyboardInterrupt(signal.Signals(_state.first).name)
    _state.raised.append(error)
    return error


def _travels() -> bool:
    """Return whether this code runs because the exception was raised: in an `except`, `finally` or `__exit__` on its way."""
    error = sys.exception()
    while error is not None:
        if any(error is one for one in _state.raised):
            return True
        error = error.__context__  # Python keeps this chain free of circles
    return False
