"""Leases: which objects a live run may still need, so that nobody else frees them.

A run has one file under `leases/`: a first line that says who it is, then a line for each digest that it takes (`+`) or gives
back (`-`). The file is locked with `flock` for as long as the process lives, so a lease is void the instant its run is dead,
however it died; what is left of the file then only tells what the run had come to.

A digest is taken under its lock before anybody looks whether the object is there, and freed under the same lock after a look
at the leases: either the run finds the object already freed, or who frees it finds the lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, TypeAdapter

from pipeline.provenance import Label, Moment
from pipeline.store.files import StoreError, is_digest, named_errors
from pipeline.store.locks import locked

__all__ = ["Lease", "LeasedArtifactError", "Leases"]

_FOLDER: Final = "leases"


class LeasedArtifactError(StoreError):
    """A live run may still need the object; nothing was freed."""


@dataclass
class Lease:
    """What one file says."""

    run: str
    host: str
    pid: int
    started: float
    """Seconds since the epoch."""
    digests: set[str] = field(default_factory=set)
    """What the run needs, or needed."""

    def __str__(self) -> str:
        return f"{self.run} ({self.host}, pid {self.pid})"


@dataclass
class _Reading:
    """How far a file was read; it only grows."""

    offset: int = 0
    lease: Lease | None = None


class _About(BaseModel):
    """The first line of a file."""

    run: Label
    host: Label
    pid: int
    started: Moment


_ABOUT: Final = TypeAdapter(_About)


class Leases:
    """The leases of one store, and the own one, once it is open."""

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / _FOLDER
        self._own: int | None = None
        self._own_name = ""
        self._held: set[str] = set()
        self._readings: dict[str, _Reading] = {}

    # -------------------------------------------------------------------------------------------- the own lease

    @contextlib.contextmanager
    def open(self, run: str) -> Iterator[None]:
        """Hold a lease inside the block, for everything that is taken meanwhile.

        What an earlier process of the same run left behind is dropped: whatever it had come to is taken again.

        Args:
            run: name of the run, for whoever is refused something.
        """
        with contextlib.ExitStack() as held:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._own_name = f"{run}.{uuid.uuid4().hex[:8]}"
                held.enter_context(locked(self._folder / self._own_name))
                self._own = os.open(self._folder / self._own_name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except OSError as error:
                # A store that cannot be written may still be read to the end.
                warnings.warn(
                    f"no lease on {self._root}, another process may free what this run reads: {error}", stacklevel=3
                )
                yield
                return
            held.callback(self._close)
            about = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
            os.write(self._own, f"{json.dumps(about)}\n".encode())
            self._drop_remains(run)
            yield

    def take(self, digest: str) -> None:
        """Add an object to the own lease; the caller holds the lock of the digest. Without an open lease: nothing."""
        self._note("+", digest)
        self._held.add(digest)

    def give_back(self, digest: str) -> None:
        """Say that this run needs an object no longer."""
        if digest in self._held:
            self._held.discard(digest)
            self._note("-", digest)

    def lacks(self, digest: str) -> bool:
        """Whether the own lease is open and does not have this object yet."""
        return self._own is not None and digest not in self._held

    def _note(self, sign: str, digest: str) -> None:
        if self._own is not None:
            with named_errors(self._root):
                os.write(self._own, f"{sign}{digest}\n".encode())

    def _close(self) -> None:
        if self._own is not None:
            os.close(self._own)
        self._own = None
        self._held.clear()

    def _drop_remains(self, run: str) -> None:
        for path, lease in self._read(alive=False):
            if lease.run == run:
                path.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------- those of others

    def refuse(self, digest: str) -> None:
        """Raise where another live run needs an object; the caller holds the lock of the digest.

        Raises:
            LeasedArtifactError: names the run, its host and its process.
        """
        for lease in self.live():
            if digest in lease.digests:
                raise LeasedArtifactError(
                    f"artifact {digest[:12]} is in use by the run {lease}, which may need it; free it when that has ended"
                )

    def live(self) -> list[Lease]:
        """The leases of other runs that live now."""
        return [lease for _, lease in self._read(alive=True)]

    def remains(self) -> dict[str, set[str]]:
        """Run -> digests, of runs that were killed and did not go on since; nothing of it is protected."""
        found: dict[str, set[str]] = {}
        for _, lease in self._read(alive=False):
            found.setdefault(lease.run, set()).update(lease.digests)
        return found

    def _read(self, *, alive: bool) -> Iterator[tuple[Path, Lease]]:
        if not self._folder.is_dir():
            return
        names = sorted(entry.name for entry in os.scandir(self._folder))
        for gone in self._readings.keys() - set(names):
            del self._readings[gone]
        for name in names:
            path = self._folder / name
            if name == self._own_name or _is_locked(path) is not alive:
                continue
            try:
                lease = self._read_on(path)
            except StoreError as error:
                if alive:  # what it protects is not known, so nothing may be freed
                    raise
                warnings.warn(f"left out: {error}", stacklevel=4)
                continue
            if lease is not None:
                yield path, lease

    def _read_on(self, path: Path) -> Lease | None:
        """What the file says, from where it was read to before; None where not even its first line is whole."""
        reading = self._readings.setdefault(path.name, _Reading())
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
            handle.seek(reading.offset)
            for line in handle:
                if not line.endswith(b"\n"):  # being written, or its writer was killed
                    break
                reading.offset += len(line)
                _take_line(reading, line.decode(errors="replace").rstrip("\n"), path)
        return reading.lease


def _take_line(reading: _Reading, line: str, path: Path) -> None:
    if reading.lease is None:
        try:
            about = _ABOUT.validate_json(line, strict=True)
            reading.lease = Lease(about.run, about.host, about.pid, about.started)
        except ValueError:
            raise StoreError(f"{path} is no lease; remove it when no run is using the store") from None
    elif is_digest(line[1:]):
        (reading.lease.digests.add if line[0] == "+" else reading.lease.digests.discard)(line[1:])


def _is_locked(path: Path) -> bool | None:
    """Whether somebody holds the lock of a file; None where the file is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two who look do not take one another for the holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
