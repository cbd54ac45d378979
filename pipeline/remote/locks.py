"""Locks and pins of machines that share a remote store; a dead holder keeps them for a minute at most.

**Locks.** A process that wants a key writes an entry of its own, `locks/KEY/UNIQUE`, and then lists the folder. It holds the
key when it sees no other live entry; else it removes its entry and tries again later. Of two that write, the later sees the
other: they never both hold. This needs a store whose listing shows what was written before (S3, GCS, Azure and file systems
do), and no conditional requests, which not all of them have. Names are never used twice, so that any process may remove a dead
entry.

The holder renews its entry; an entry is dead when it was not renewed for `seconds` by the *server's* clock. A holder that slept
longer than that (a closed laptop) may find another at its work: both write the same content under the same name.

**Pins.** A process writes `pins/PROCESS/DIGEST` before it looks whether an object is there that it may fetch later. A process
that frees an object writes its note before it looks for pins, and takes the note back if there is one. Of the two, the later
sees the earlier. `pins/PROCESS/alive` is renewed while the process lives; without it the pins are void. A process removes its
own when it ends; once it has lived for some time, it removes those of killed ones.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from typing import Final

from pipeline.progress import report
from pipeline.remote.bucket import Bucket, Entry
from pipeline.store.files import StoreError

LEASE_SECONDS: Final = 60.0
"""Ours: shorter than a stage that is worth a lock, longer than a throttled renewal."""
_COARSE: Final = 2.0
"""Seconds. Modification times of S3 are whole seconds, and one request lies between two of them."""
_CALIBRATED: Final = 300.0
_MOST_SKEW: Final = 300.0
"""Seconds. Ours: S3 refuses requests at 900; dates in records of several machines are compared before that."""
_POLL: Final = (0.5, 1.5)
_PINS: Final = "pins"
_AT_EXIT: Final = 3.0
"""Seconds that a process takes at most, when it ends, to remove its pins; the rest is void and left to others."""


class ServerClock:
    """The clock of the server that keeps the files."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._offset, self._until = 0.0, 0.0

    def now(self) -> float:
        """Return seconds since the epoch, late by up to a second and one request: nothing is found dead too early.

        Raise StoreError where the clock of this host is off by more than five minutes.
        """
        if time.monotonic() >= self._until:
            self.measured()
        return time.monotonic() + self._offset

    def measured(self) -> float:
        """Measure how many seconds this host's clock is ahead of the server's; raise as `now`."""
        name = uuid.uuid4().hex
        before, here = time.monotonic(), time.time()
        self._bucket.write(f"clock/{name}", b"")
        after = time.monotonic()
        entry = self._bucket.entries("clock").get(name)
        self._bucket.remove([f"clock/{name}"])
        if entry is None:
            raise StoreError(f"{self._bucket.url}: a file just written is not listed; such a store cannot be shared")
        skew = here + (after - before) / 2 - entry.modified
        if abs(skew) > _MOST_SKEW:
            raise StoreError(
                f"{self._bucket.url}: the clock of this host is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the "
                f"server's (at most {_MOST_SKEW:.0f} s); set it (`timedatectl set-ntp true`) and run the same command again"
            )
        self._offset, self._until = entry.modified - after, time.monotonic() + _CALIBRATED
        return skew


class RemoteLocks:
    """The locks of one store."""

    def __init__(self, bucket: Bucket, clock: ServerClock, *, seconds: float = LEASE_SECONDS) -> None:
        """Take the bucket, its clock, and after how many seconds without renewal an entry is dead."""
        self._bucket, self._clock, self._seconds = bucket, clock, seconds

    @contextlib.contextmanager
    def held(self, key: str) -> Iterator[None]:
        """Hold a key, waiting for it as long as it takes; a wait is reported with its holder."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        waited = False
        while not self._try(key, name):
            if not waited:
                report("lock", waiting_for=key, holder=self._holder(key))
            waited = True
            time.sleep(random.uniform(*_POLL))
        with self._renewed(f"locks/{key}/{name}"):
            yield

    def _try(self, key: str, name: str) -> bool:
        if self._live(key):
            return False
        self._bucket.write(f"locks/{key}/{name}", _about())
        # Not only "no other": a process that slept since writing may have been taken for dead, and its entry removed.
        if self._live(key) == [name]:
            return True
        self._bucket.remove([f"locks/{key}/{name}"])
        return False

    def _live(self, key: str) -> list[str]:
        """Return the live entries of a key; dead ones are removed on the way."""
        entries = self._bucket.entries(f"locks/{key}")
        if not entries:
            return []
        now = self._clock.now()
        dead = [name for name, entry in entries.items() if now - entry.modified > self._seconds + _COARSE]
        self._bucket.remove(f"locks/{key}/{name}" for name in dead)
        return [name for name in entries if name not in dead]

    def _holder(self, key: str) -> str:
        for name, data in self._bucket.read_all(f"locks/{key}/{name}" for name in self._live(key)).items():
            with contextlib.suppress(ValueError, KeyError):
                about = json.loads(data)
                return f"{about['host']}, pid {about['pid']}, since {about['since']}"
            return name
        return "a process that ended"

    @contextlib.contextmanager
    def _renewed(self, name: str) -> Iterator[None]:
        done, owner = threading.Event(), os.getpid()
        thread = threading.Thread(target=self._renew, args=(name, done), name="cohort-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            if os.getpid() == owner:  # a forked child does not hold the lock
                done.set()
                thread.join()
                with contextlib.suppress(StoreError):  # it dies by itself
                    self._bucket.remove([name])

    def _renew(self, name: str, done: threading.Event) -> None:
        renewed, warned, about = time.monotonic(), False, _about()
        while not done.wait(self._seconds / 4):
            late = time.monotonic() - renewed > self._seconds
            if late and not warned:
                warned = True
                text = "a lock could not be renewed; another machine may repeat this stage"
                warnings.warn(f"{self._bucket.url}: {text}", stacklevel=2)
            with contextlib.suppress(StoreError):
                # An entry that is late may have been removed: it must not be written again.
                if late and not self._is_there(name):
                    return
                self._bucket.write(name, about, patience=0.0)
                renewed = time.monotonic()

    def _is_there(self, name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return last in self._bucket.entries(folder)


class RemotePins:
    """The pins of this process, and those of others."""

    def __init__(self, bucket: Bucket, clock: ServerClock, *, seconds: float) -> None:
        """Take the bucket, its clock, and after how many seconds without renewal a process is dead."""
        self._bucket, self._clock, self._seconds = bucket, clock, seconds
        self._name, self._pid, self._guard = "", 0, threading.Lock()

    def add(self, digest: str) -> None:
        """Pin an object until this process ends."""
        with self._guard:
            if self._pid != os.getpid():  # the first, or after a fork
                self._name, self._pid = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", os.getpid()
                self._renew(self._name, patience=None)
                threading.Thread(target=self._live, args=(self._name,), name="cohort-pins", daemon=True).start()
                atexit.register(self.end)
        self._bucket.write(f"{_PINS}/{self._name}/{digest}", b"")

    def of(self, digest: str) -> list[str]:
        """Return the other live processes that pin an object; pins of dead ones are removed on the way."""
        entries = self._bucket.entries(_PINS)
        if not entries:
            return []
        alive = self._sweep(entries)
        holders = {name.split("/")[0] for name in entries if name.endswith(f"/{digest}")}
        return sorted(holders & alive - {self._name})

    def end(self) -> None:
        """Remove all pins; called when the process ends."""
        if self._pid != os.getpid():  # a forked child has no pins of its parent's
            return
        name, self._name, self._pid = self._name, "", 0
        deadline, patience = time.monotonic() + _AT_EXIT, self._bucket.patience
        self._bucket.patience = 0.0  # a server that does not answer must not delay the end
        with contextlib.ExitStack() as after, contextlib.suppress(StoreError):
            after.callback(setattr, self._bucket, "patience", patience)
            self._bucket.remove([f"{_PINS}/{name}/alive"])  # first: without it the rest is void
            for pinned in self._bucket.entries(f"{_PINS}/{name}"):
                if time.monotonic() > deadline:
                    return
                self._bucket.remove([f"{_PINS}/{name}/{pinned}"])

    def _sweep(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return the processes that live; pins of others are removed."""
        now = self._clock.now()
        alive = {
            name.removesuffix("/alive")
            for name, entry in entries.items()
            if name.endswith("/alive") and now - entry.modified <= self._seconds
        }
        self._bucket.remove(f"{_PINS}/{name}" for name in entries if name.split("/")[0] not in alive)
        return alive

    def _live(self, name: str) -> None:
        wait, swept = threading.Event(), False
        while not wait.wait(self._seconds / 4) and name == self._name:
            with contextlib.suppress(StoreError):
                self._renew(name, patience=0.0)
                if not swept:
                    self._sweep(self._bucket.entries(_PINS))
                    swept = True

    def _renew(self, name: str, *, patience: float | None) -> None:
        self._bucket.write(f"{_PINS}/{name}/alive", b"", patience=patience)


def _about() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
