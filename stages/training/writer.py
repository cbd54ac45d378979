"""Write a checkpoint while the next stage runs, from a copy in memory."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.derivation.materialise import write_payload
from pipeline.residency import resident
from pipeline.store import Store

_SLOT: Final = "writer"


class Writer:
    """Write one checkpoint at a time in a thread. A resident (`Holder`): whoever reads the checkpoint waits for it."""

    def __init__(self) -> None:
        self.holds: str | None = None
        """`Artifact.state` of the checkpoint that is being written."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, store: Store, name: str, state: str, fill: Callable[[Path], None]) -> None:
        """Write the payload of `name`; raise what the one before failed with."""
        self.wait()

        def write() -> None:
            try:
                write_payload(store, name, fill)
            except Exception as error:
                self._error = error
            finally:
                self.holds = None

        self.holds = state
        # Not a daemon: a process that ends has written what it began to write.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(write,), name="checkpoint")
        self._thread.start()

    def has(self, state: str) -> bool:
        """Return whether it is writing a state."""
        return self.holds == state

    def write(self, name: str) -> None:
        """Wait until it is written; its copy in memory is the artifact `name`."""
        self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what writing failed with."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait; what was not written is replayed when somebody reads it."""
        if self._thread is not None:
            self._thread.join()


def writer() -> Writer:
    """Return the writer of this process."""
    return resident(_SLOT, None, Writer)
