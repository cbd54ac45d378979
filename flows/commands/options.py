"""Options that several commands share, and where commands print."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TextIO, cast

from cyclopts import Parameter
from rich.console import Console

from flows.wording import SafeConsole

__all__ = ["ConfigFiles", "LastingStream", "Method", "Root", "Settings", "console", "debugging"]

Root = Annotated[Path | None, Parameter(name="--root")]
ConfigFiles = Annotated[list[Path] | None, Parameter(name="--config", negative="")]
Method = Annotated[str | None, Parameter(name="--method")]
Settings = Annotated[list[str] | None, Parameter(name="--set", negative="")]

_PLAIN_WIDTH: Final = 120
_READER_GONE: Final = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""What writing gives once a pipe or a terminal was closed at its other end."""


class LastingStream(io.TextIOBase):
    """A text stream whose reader may go away: the terminal is closed, `| head` has read enough.

    From then on it is silent, and so is the file descriptor below it, also at the interpreter's exit. Other errors, such as a
    full disk behind a redirection, are raised.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream` as long as it takes anything."""
        self._stream = stream
        self._gone = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether it is a terminal, as long as that is there."""
        return not self._gone and self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor below."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text`, or nothing where there is no reader left."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            call()
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
            self._gone = True
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def console(*, errors: bool = False) -> Console:
    """Standard output, or standard error: as wide as the terminal, and of a fixed width where there is none."""
    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return SafeConsole(file=cast(TextIO, LastingStream(stream)), width=width, highlight=False)


def debugging() -> bool:
    """Whether `--debug` or COHORT_DEBUG asks for tracebacks and the warnings of libraries."""
    return os.environ.get("COHORT_DEBUG", "") not in ("", "0")
