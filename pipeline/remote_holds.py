"""What live processes took from a remote store without having a copy yet, so that nobody on another machine frees it.

A process writes `holds/PROCESS/DIGEST` before it looks whether the object is there; who frees an object writes its note before
it looks for holds, and takes the note back if there is one. Of the two, the later sees the earlier. `holds/PROCESS/alive` is
renewed while the process lives; without, what it held is void.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from typing import Final

from pipeline.bucket import Bucket
from pipeline.remote_lock import ServerClock
from pipeline.sealing import StoreError

__all__ = ["RemoteHolds"]

_FOLDER: Final = "holds"


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
                self._renew(patience=None)
                threading.Thread(target=self._live, args=(self._name,), name="cohort-holds", daemon=True).start()
        self._bucket.write(f"{_FOLDER}/{self._name}/{digest}", b"")

    def of(self, digest: str) -> list[str]:
        """The other live processes that hold an object; what dead ones held is removed on the way."""
        entries = self._bucket.entries(_FOLDER)
        if not entries:
            return []
        now = self._clock.now()
        alive = {
            name.removesuffix("/alive")
            for name, entry in entries.items()
            if name.endswith("/alive") and now - entry.modified <= self._seconds
        }
        self._bucket.remove(f"{_FOLDER}/{name}" for name in entries if name.split("/")[0] not in alive)
        holders = {name.split("/")[0] for name in entries if name.endswith(f"/{digest}")}
        return sorted(holders & alive - {self._name})

    def _live(self, name: str) -> None:
        wait = threading.Event()
        while not wait.wait(self._seconds / 4) and name == self._name:
            with contextlib.suppress(StoreError):
                self._renew(patience=0.0)

    def _renew(self, *, patience: float | None) -> None:
        self._bucket.write(f"{_FOLDER}/{self._name}/alive", b"", patience=patience)
