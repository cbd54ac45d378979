"""Options that several commands share, and the console that they print on."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TextIO, cast

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from flows.wording import SafeConsole

if TYPE_CHECKING:
    from flows.config.resolve import Choice

Flag = Annotated[bool, Parameter(negative="")]
EngineOption = Annotated[
    Literal["prefect", "inline"],
    Parameter(
        name="--engine",
        help="`prefect` shows states and logs in Prefect's UI (a local server is started when none is configured); `inline` "
        "makes plain calls, without a server.",
    ),
]
Limit = Parameter(name=["--limit", "-n"], validator=Number(gte=1))
Root = Annotated[
    Path | None,
    Parameter(name="--root", help="Folder of store, runs and databases; default: COHORT_ROOT or ./artifacts."),
]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Changes:
    """Options that change a configuration."""

    config: Annotated[tuple[Path, ...], Parameter(name="--config", negative="", show_default=False)] = ()
    "YAML file of overrides, nested or with dotted keys; may be given several times."
    settings: Settings = ()
    "`key=value`, for example `--set rollout.G=8`; may be given several times."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MethodChanges(Changes):
    """Options that change a configuration and may choose its method."""

    method: Annotated[str | None, Parameter(name="--method")] = None
    "Another method than the recipe's (`cohort methods`); `--config` and `--set` come after it."

    def choose(self, recipe: str) -> Choice:
        """Return the configuration of a recipe, or a YAML file, with these changes."""
        from flows.config.resolve import choose  # all configs, a second that other commands do without

        return choose(recipe, self.config, self.settings, method=self.method)


UNCHANGED: Final = MethodChanges()

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
        """Return that of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Return whether it is a terminal that is still there."""
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
    """Return a console on standard output, or standard error, as wide as its terminal."""
    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return SafeConsole(file=cast(TextIO, LastingStream(stream)), width=width, highlight=False)


def debugging() -> bool:
    """Return whether `--debug` or COHORT_DEBUG asks for tracebacks and the warnings of libraries."""
    return os.environ.get("COHORT_DEBUG", "") not in ("", "0")
