"""Locks between machines that share a remote store, which a dead holder keeps for a minute at most.

Who wants a key writes an entry of its own, `locks/KEY/UNIQUE`, and then lists the folder. It holds the key when it sees no
other live entry; else it removes its entry and tries again later. Of two who write, the later sees the other, so they never
both hold. That wants a store whose listing shows what was written before (S3, GCS, Azure and file systems do), and no
conditional requests, which not all of them have. Names are never used twice, so that anybody may remove a dead entry.

The holder renews its entry; an entry is dead when it was not renewed for `seconds` by the *server's* clock. A holder that slept
longer than that (a closed laptop) may find another at its work: both write the same content under the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from typing import Final

from pipeline.progress import report
from pipeline.remote.bucket import Bucket
from pipeline.store.files import StoreError

__all__ = ["LEASE_SECONDS", "RemoteLocks", "ServerClock"]

LEASE_SECONDS: Final = 60.0
"""Ours: short beside a stage that is worth a lock, long beside a renewal that is throttled."""
_COARSE: Final = 2.0
"""Seconds. Modification times of S3 are whole seconds, and one request lies between two of them."""
_CALIBRATED: Final = 300.0
_MOST_SKEW: Final = 300.0
"""Seconds. Ours: S3 refuses requests at 900; dates in records of several machines are compared before that."""
_POLL: Final = (0.5, 1.5)


class ServerClock:
    """The time by the clock of the server that keeps the files, whatever that of this host says."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._offset, self._until = 0.0, 0.0

    def now(self) -> float:
        """Seconds since the epoch, late by up to a second and one request: nothing is found dead too early.

        Raises:
            StoreError: the clock of this host is off by more than five minutes.
        """
        if time.monotonic() >= self._until:
            self.measured()
        return time.monotonic() + self._offset

    def measured(self) -> float:
        """How many seconds this host's clock is ahead of the server's, measured now; raises as `now`."""
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
        """Take where entries lie, and after how many seconds without renewal one is dead."""
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
        # Not only "no other": who slept since writing may have been taken for dead, and its entry removed.
        if self._live(key) == [name]:
            return True
        self._bucket.remove([f"locks/{key}/{name}"])
        return False

    def _live(self, key: str) -> list[str]:
        """The live entries of a key; dead ones are removed on the way."""
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
        return "nobody any more"

    @contextlib.contextmanager
    def _renewed(self, name: str) -> Iterator[None]:
        done, owner = threading.Event(), os.getpid()
        thread = threading.Thread(target=self._renew, args=(name, done), name="cohort-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            if os.getpid() == owner:  # a forked child holds nothing
                done.set()
                thread.join()
                with contextlib.suppress(StoreError):  # it dies by itself
                    self._bucket.remove([name])

    def _renew(self, name: str, done: threading.Event) -> None:
        renewed, told, about = time.monotonic(), False, _about()
        while not done.wait(self._seconds / 4):
            late = time.monotonic() - renewed > self._seconds
            if late and not told:
                told = True
                text = "a lock could not be renewed; another machine may repeat this stage"
                warnings.warn(f"{self._bucket.url}: {text}", stacklevel=2)
            with contextlib.suppress(StoreError):
                # Past its time the entry may be another's to remove: it must not rise again.
                if late and not self._is_there(name):
                    return
                self._bucket.write(name, about, patience=0.0)
                renewed = time.monotonic()

    def _is_there(self, name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return last in self._bucket.entries(folder)


def _about() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
