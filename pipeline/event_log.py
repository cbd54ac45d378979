"""The log of a run: `runs/<key>/events.jsonl`, one event a line.

`{"type":"StepDone","number":7,"time":...,"attempt":"1f2e3d4c",...}`: `number` ascends over all attempts of a run, and several
processes may append. A call that is found again with the result that the log has, and a step that came to the same calls, are
not written a second time. The log therefore says what the run came to; how much each attempt reused is in its `RunEnded`.

Readers drop a torn last line, and the next writer cuts it. A damaged line is skipped, with a warning that names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from pipeline import events
from pipeline.config.text import without_password
from pipeline.events import LONGEST_TEXT, Event, StageDone
from pipeline.store.actions import complaint
from pipeline.store.locks import try_lock

LOG: Final = "events.jsonl"
_PREFIX: Final = re.compile(rb'\{"type":"([A-Za-z]{1,30})",')
_LONGEST_LINE: Final = 1 << 22
_WAIT_SECONDS: Final = 0.001
"""Between two tries for the log's lock, which is held for microseconds."""
_TYPES: Final[Mapping[str, type[Event]]] = {
    name: kind
    for name, kind in vars(events).items()
    if isinstance(kind, type) and issubclass(kind, Event) and name[0] != "_" and kind is not Event
}
_ADAPTERS: Final = {name: TypeAdapter[Event](kind) for name, kind in _TYPES.items()}


class EventLog:
    """The log of one run, for one attempt; other processes may append to it at the same time."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG
        self.attempt = secrets.token_hex(4)
        self._lock = folder / f".{LOG}.lock"
        self._size = 0
        """Bytes that are known."""
        self._number = 0
        self._known: dict[Hashable, tuple[int, int]] = {}
        """Slot -> number of its last event, and the hash of its content."""
        self._unwritten: list[Event] = []
        self._warned = False

    def take(self, event: Event) -> None:
        """Append an event; a log that cannot be written is named in one warning, and written when it can be again."""
        try:
            self.append(event)
        except OSError as error:
            if not self._warned:
                self._warned = True  # before the warning, which is an event
                warnings.warn(f"the log of this run is not up to date: {error}", stacklevel=2)

    def append(self, event: Event) -> int:
        """Write an event unless it repeats the last of its slot; returns its number, or that of the one it repeats.

        One write per line: a kill leaves all of it, or a torn line at the end.

        Raises:
            OSError: the file cannot be written; the event is written with the next one that can be.
        """
        self._unwritten.append(dataclasses.replace(event, attempt=self.attempt, time=event.time or time.time()))
        number = 0
        with self._locked():
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                self._catch_up(handle)
                while self._unwritten:
                    number = self._write(handle, self._unwritten.pop(0))
            finally:
                os.close(handle)
        return number

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        while True:
            with try_lock(self._lock) as held:
                if held:
                    yield
                    return
            time.sleep(_WAIT_SECONDS)

    def _write(self, handle: int, event: Event) -> int:
        number, content = self._known.get(event.slot(), (0, 0))
        computed = isinstance(event, StageDone) and not event.cached
        if number and not computed and content == hash(event.content()):
            return number
        event = dataclasses.replace(event, number=self._number + 1)
        line = _line(event)
        try:
            if os.write(handle, line) < len(line):
                os.ftruncate(handle, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
        except OSError:
            self._unwritten.insert(0, event)
            raise
        self._size += len(line)
        self._note(event)
        return event.number

    def _catch_up(self, handle: int) -> None:
        """Read what others wrote, and cut a torn line: no one else is writing."""
        size = os.fstat(handle).st_size
        if size == self._size:
            return
        if size < self._size:  # replaced or cut by hand
            self._size, self._number, self._known = 0, 0, {}
        content = b""
        while part := os.pread(handle, size - self._size - len(content), self._size + len(content)):
            content += part
        whole = content.rfind(b"\n") + 1
        for _, event in _scan(content[:whole]):
            if isinstance(event, Event):
                self._note(event)
        self._size += whole
        if whole < len(content):
            os.ftruncate(handle, self._size)

    def _note(self, event: Event) -> None:
        self._number = max(self._number, event.number)
        if (slot := event.slot()) is not None:
            self._known[slot] = event.number, hash(event.content())


class LogReader:
    """Reads a log from where it was read before."""

    def __init__(self, file: Path) -> None:
        self._file, self._size, self._lines = file, 0, 0
        self.damaged: list[int] = []
        """Numbers of lines, from 1, that are no events."""

    def new(self, kinds: Collection[type[Event]] = ()) -> list[Event]:
        """Return the events that were appended since, of these kinds (all by default), in their order.

        A torn last line is left for the next time. A log that became shorter is read from its beginning.

        Raises:
            OSError: there is no such file.
        """
        with open(self._file, "rb") as log:
            if os.fstat(log.fileno()).st_size < self._size:
                self._size = self._lines = 0
            log.seek(self._size)
            content = log.read()
        found = []
        for number, event in _scan(content, {kind.__name__.encode() for kind in kinds}):
            if isinstance(event, Event):
                found.append(event)
            else:
                self.damaged.append(self._lines + number)
        self._size += content.rfind(b"\n") + 1
        self._lines += content.count(b"\n")
        return found

    def warn(self) -> None:
        """Warn of the lines that cannot be read, where there are any."""
        if self.damaged:
            more = f" and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
            warnings.warn(
                f"{self._file}: line {self.damaged[0]}{more} cannot be read and is left out; the results are not touched",
                stacklevel=3,
            )


def read_events(file: Path, after: int = 0, kinds: Collection[type[Event]] = ()) -> list[Event]:
    """Return the events of a log whose number is above `after`, of these kinds (all by default), in their order.

    Raises:
        OSError: there is no such file.
    """
    reader = LogReader(file)
    found = [event for event in reader.new(kinds) if event.number > after]
    reader.warn()
    return found


def parse_events(file: Path) -> list[Event]:
    """Return all events of a log that others bring.

    Raises:
        OSError: there is no such file.
        ValueError: a line is no event, has a field of another type or out of range, or its number does not ascend.
    """
    found: list[Event] = []
    for number, event in _scan(file.read_bytes()):
        if not isinstance(event, Event):
            raise ValueError(f"line {number}: {event}")
        if found and event.number <= found[-1].number:
            raise ValueError(f"line {number}: number: expected more than {found[-1].number}, found {event.number}")
        found.append(event)
    return found


def _scan(content: bytes, names: Collection[bytes] = ()) -> Iterator[tuple[int, Event | ValueError]]:
    """Yield the number of each whole line, from 1, with its event or what is wrong with it; of the types named only."""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        found = _PREFIX.match(line)
        if names and found and found[1] not in names:
            continue
        yield number, _parsed(line, found)


def _parsed(line: bytes, found: re.Match[bytes] | None) -> Event | ValueError:
    adapter = _ADAPTERS.get(found[1].decode()) if found else None
    if found is None or adapter is None or len(line) > _LONGEST_LINE:
        return ValueError('expected {"type":"<an event>", ...} in one line')
    try:
        return adapter.validate_json(b"{" + line[found.end() :])
    except ValidationError as error:
        return ValueError(complaint(error))
    except (ValueError, RecursionError) as error:
        return ValueError(str(error)[:100])


def _line(event: Event) -> bytes:
    values: dict[str, Any] = {
        "type": type(event).__name__,
        "number": event.number,
        "time": event.time,
        "attempt": event.attempt,
    }
    values |= event.values()
    for name in ("error", "text"):
        if name in values:
            values[name] = without_password(values[name])[:LONGEST_TEXT]
    text = json.dumps(values, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"  # bytes of a command line that are no text
