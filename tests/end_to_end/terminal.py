"""A terminal for the tests: a pseudo-terminal of a given size, what was written on it, and commands that run on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command

REPOSITORY = Path(__file__).parents[2]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """A pseudo-terminal whose other end is read by a thread, as a terminal emulator does."""

    def __init__(self, columns: int, rows: int = 40) -> None:
        self.master, self.slave = os.openpty()
        self.columns, self.rows = columns, rows
        self.resize(columns, rows)
        self._bytes = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int, rows: int) -> None:
        """Set the size of the window; the kernel tells the foreground processes by SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def text(self) -> str:
        """All that was written so far, without escapes."""
        return _ESCAPES.sub("", self._bytes.decode("utf-8", "replace"))

    @property
    def raw(self) -> str:
        """All that was written so far."""
        return self._bytes.decode("utf-8", "replace")

    def wait_for(self, found: Callable[[str], bool], *, seconds: float = 120.0) -> None:
        """Wait until what was written fulfils a condition."""
        deadline = time.monotonic() + seconds
        while not found(self.text):
            assert time.monotonic() < deadline, self.text[-2000:]
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())

    def close(self) -> None:
        """Close the window: processes of the terminal get SIGHUP, and writing to it fails."""
        if self.master >= 0:
            master, self.master = self.master, -1
            os.close(self.slave)
            os.close(master)

    def start(
        self, *arguments: str, before: Callable[[], Any] | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Run `cohort` with these arguments in a session of its own, on this terminal.

        Args:
            before: called in the new process before the command begins.
        """

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if before:
                before()

        code = "import sys; sys.argv[0] = 'cohort'; from flows.cli import main; main()"
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=REPOSITORY,
            env=plain | {"TERM": "xterm-256color"} | environment,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO once the last process has closed its end
            while part := os.read(self.master, 65536):
                self._bytes += part


@contextlib.contextmanager
def terminal(columns: int, rows: int = 40) -> Iterator[Terminal]:
    """A terminal that is closed at the end."""
    opened = Terminal(columns, rows)
    try:
        yield opened
    finally:
        opened.close()


def on_terminal(arguments: list[str], columns: int, **environment: str) -> tuple[int, Terminal]:
    """Run a command in this process on a terminal: its exit code and the terminal, which is closed by then."""
    settings = {"TERM": "xterm-256color", "COLUMNS": str(columns), "COHORT_DEBUG": "0"} | environment
    with (
        terminal(columns) as opened,
        pytest.MonkeyPatch.context() as patch,
        os.fdopen(os.dup(opened.slave), "w") as out,
    ):
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        patch.setattr(warnings, "showwarning", lambda message, *_, **__: print(f"warning: {message}", file=out))
        code = run_command(arguments)
        out.flush()
        out.write("\nEND OF OUTPUT\n")
        out.flush()
        opened.wait_for(lambda text: "END OF OUTPUT" in text, seconds=20)
    return code, opened


def piped(arguments: list[str], columns: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process without a terminal: its exit code and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("COHORT_DEBUG", "0")
        capsys.readouterr()
        code = run_command(arguments)
    return code, capsys.readouterr().out
