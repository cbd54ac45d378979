"""What live processes took from a remote store without having a copy yet, so that nobody on another machine frees it.

A process writes `holds/PROCESS/DIGEST` before it looks whether the object is there; who frees an object writes its note before
it looks for holds, and takes the note back if there is one. Of the two, the later sees the earlier. `holds/PROCESS/alive` is
renewed while the process lives; without, what it held is void. A process removes its own when it ends. Once it has lived for
some time, it removes what killed ones left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Final

from pipeline.remote.bucket import Bucket, Entry
from pipeline.remote.locks import ServerClock
from pipeline.store.files import StoreError

__all__ = ["RemoteHolds"]

_FOLDER: Final = "holds"
_AT_EXIT: Final = 3.0
"""Seconds that a process takes at most, when it ends, to remove what it held; the rest is void and left to others."""


class RemoteHolds:
    """The holds of this process, and those of others."""

    def __init__(self, bucket: Bucket, clock: ServerClock, *, seconds: float) -> None:
        """Take where they lie, and after how many seconds without renewal a process is dead."""
        self._bucket, self._clock, self._seconds = bucket, clock, seconds
        self._name, self._pid, self._guard = "", 0, threading.Lock()

    def take(self, digest: str) -> None:
        """Hold an object until this process ends."""
        with self._guard:
            if self._pid != os.getpid():  # the first, or after a fork
                self._name, self._pid = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", os.getpid()
                self._renew(self._name, patience=None)
                threading.Thread(target=self._live, args=(self._name,), name="cohort-holds", daemon=True).start()
                atexit.register(self.end)
        self._bucket.write(f"{_FOLDER}/{self._name}/{digest}", b"")

    def of(self, digest: str) -> list[str]:
        """The other live processes that hold an object; what dead ones held is removed on the way."""
        entries = self._bucket.entries(_FOLDER)
        if not entries:
            return []
        alive = self._sweep(entries)
        holders = {name.split("/")[0] for name in entries if name.endswith(f"/{digest}")}
        return sorted(holders & alive - {self._name})

    def end(self) -> None:
        """Hold nothing any more; called when the process ends."""
        if self._pid != os.getpid():  # a forked child holds nothing of its parent's
            return
        name, self._name, self._pid = self._name, "", 0
        deadline, patience = time.monotonic() + _AT_EXIT, self._bucket.patience
        self._bucket.patience = 0.0  # an end is not delayed by a server that does not answer
        with contextlib.ExitStack() as after, contextlib.suppress(StoreError):
            after.callback(setattr, self._bucket, "patience", patience)
            self._bucket.remove([f"{_FOLDER}/{name}/alive"])  # first: without it the rest is void
            for held in self._bucket.entries(f"{_FOLDER}/{name}"):
                if time.monotonic() > deadline:
                    return
                self._bucket.remove([f"{_FOLDER}/{name}/{held}"])

    def _sweep(self, entries: Mapping[str, Entry]) -> set[str]:
        """The processes that live; what others held is removed."""
        now = self._clock.now()
        alive = {
            name.removesuffix("/alive")
            for name, entry in entries.items()
            if name.endswith("/alive") and now - entry.modified <= self._seconds
        }
        self._bucket.remove(f"{_FOLDER}/{name}" for name in entries if name.split("/")[0] not in alive)
        return alive

    def _live(self, name: str) -> None:
        wait, swept = threading.Event(), False
        while not wait.wait(self._seconds / 4) and name == self._name:
            with contextlib.suppress(StoreError):
                self._renew(name, patience=0.0)
                if not swept:
                    self._sweep(self._bucket.entries(_FOLDER))
                    swept = True

    def _renew(self, name: str, *, patience: float | None) -> None:
        self._bucket.write(f"{_FOLDER}/{name}/alive", b"", patience=patience)
