"""Pins: the objects that a live run may still need, which no other process may free.

A run has one file under `pins/`: a first line that names the run, then a line for each digest that it pins (`+`) or unpins
(`-`). The file is locked for as long as the process lives. Pins are void the instant their run is dead, however it died; the
file that it leaves says what the run had come to.

A digest is pinned under its lock before anything looks whether the object is there, and freed under the same lock after a look
at all pins. Either the run finds the object freed already, or the process that frees it finds the pin.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from pipeline.store.actions import Label, Moment
from pipeline.store.files import StoreError, is_digest, named_errors
from pipeline.store.locks import is_locked, locked


class PinnedArtifactError(StoreError):
    """A live run may still need the object; nothing was freed."""


@dataclass
class RunPins:
    """The content of one file."""

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
    pins: RunPins | None = None


class _FirstLine(BaseModel):
    run: Label
    host: Label
    pid: int
    started: Moment


class Pins:
    """The pins of all runs in one store, and the own ones while they are open."""

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / "pins"
        self._own: int | None = None
        self._own_name = ""
        self._pinned: set[str] = set()
        self._readings: dict[str, _Reading] = {}

    @contextlib.contextmanager
    def open(self, run: str) -> Iterator[None]:
        """Keep a file of pins for `run` inside the block. Pins that a dead process of the same run left are dropped."""
        with contextlib.ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._own_name = f"{run}.{uuid.uuid4().hex[:8]}"
                stack.enter_context(locked(self._folder / self._own_name))
                self._own = os.open(self._folder / self._own_name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except OSError as error:
                # A store that cannot be written may still be read to the end.
                warnings.warn(
                    f"no pins in {self._root}, another process may free what this run reads: {error}", stacklevel=3
                )
                yield
                return
            stack.callback(self._close)
            about = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
            os.write(self._own, f"{json.dumps(about)}\n".encode())
            for path, pins in self._read(alive=False):
                if pins.run == run:
                    path.unlink(missing_ok=True)
            yield

    def add(self, digest: str) -> None:
        """Pin an object, if the own pins are open; the caller holds the lock of the digest."""
        self._note("+", digest)
        self._pinned.add(digest)

    def remove(self, digest: str) -> None:
        """Unpin an object that this run needs no longer."""
        if digest in self._pinned:
            self._pinned.discard(digest)
            self._note("-", digest)

    def lacks(self, digest: str) -> bool:
        """Return whether the own pins are open and do not have this object yet."""
        return self._own is not None and digest not in self._pinned

    def _note(self, sign: str, digest: str) -> None:
        if self._own is not None:
            with named_errors(self._root):
                os.write(self._own, f"{sign}{digest}\n".encode())

    def _close(self) -> None:
        if self._own is not None:
            os.close(self._own)
        self._own = None
        self._pinned.clear()

    def require_unpinned(self, digest: str) -> None:
        """Raise PinnedArtifactError, with run, host and process, where another live run needs an object.

        The caller holds the lock of the digest.
        """
        for pins in self.live():
            if digest in pins.digests:
                raise PinnedArtifactError(
                    f"artifact {digest[:12]} is in use by the run {pins}, which may need it; free it when that has ended"
                )

    def live(self) -> list[RunPins]:
        """Return the pins of other runs that live now."""
        return [pins for _, pins in self._read(alive=True)]

    def remains(self) -> dict[str, set[str]]:
        """Return run -> digests of runs that were killed and not resumed since; they are not protected."""
        found: dict[str, set[str]] = {}
        for _, pins in self._read(alive=False):
            found.setdefault(pins.run, set()).update(pins.digests)
        return found

    def _read(self, *, alive: bool) -> Iterator[tuple[Path, RunPins]]:
        if not self._folder.is_dir():
            return
        names = sorted(entry.name for entry in os.scandir(self._folder))
        for gone in self._readings.keys() - set(names):
            del self._readings[gone]
        for name in names:
            path = self._folder / name
            if name == self._own_name or is_locked(path) is not alive:
                continue
            try:
                pins = self._read_on(path)
            except StoreError as error:
                if alive:  # what it protects is not known, so nothing may be freed
                    raise
                warnings.warn(f"left out: {error}", stacklevel=4)
                continue
            if pins is not None:
                yield path, pins

    def _read_on(self, path: Path) -> RunPins | None:
        """Return the content of a file, read on from the last offset; None where its first line is not whole."""
        reading = self._readings.setdefault(path.name, _Reading())
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
            handle.seek(reading.offset)
            for line in handle:
                if not line.endswith(b"\n"):  # being written, or its writer was killed
                    break
                reading.offset += len(line)
                _take_line(reading, line.decode(errors="replace").rstrip("\n"), path)
        return reading.pins


def _take_line(reading: _Reading, line: str, path: Path) -> None:
    if reading.pins is None:
        try:
            first = _FirstLine.model_validate_json(line, strict=True)
        except ValueError:
            raise StoreError(f"{path} is no file of pins; remove it when no run is using the store") from None
        reading.pins = RunPins(**first.model_dump())
    elif is_digest(line[1:]):
        (reading.pins.digests.add if line[0] == "+" else reading.pins.digests.discard)(line[1:])
