"""The record of a run: a folder with config.yaml, events.jsonl, and views for people.

The folder is named after the run and a hash of its whole configuration, so that two configurations of one name never share
one. Running a configuration again adds an attempt to its log, of which the record is a fold; the other files are views of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from flows.runs.paths import Places
from flows.runs.state import RunState
from pipeline.event_log import LOG, EventLog, LogReader, parse_events, read_events
from pipeline.events import Event, RunEnded, RunStarted, StageDone, StepDone
from pipeline.orchestration.server_process import is_alive, start_of
from pipeline.progress import failsafe
from pipeline.store import StoreError, canonical_json, sha256_of
from pipeline.store.files import is_digest

if TYPE_CHECKING:
    from flows.config import IterativeRLConfig
    from flows.config.resolve import Asked

Status = Literal["running", "finished", "failed", "interrupted", "killed"]
ARTIFACTS: Final = "artifacts.json"
"""What a study used: digest -> stage, in `<its report's name>.artifacts.json`. Of a run its log says so."""
IMPORTED: Final = "imported.json"
"""Marks the folder of a run that came with an archive and was not asked for here since: nothing runs it by itself."""
_SUFFIXES: Final = (".json", ".jsonl", ".yaml", ".png", ".svg", ".md", ".html", ".csv", ".txt")
"""Of the files in a run's folder."""
_OF_RECORDS: Final = (RunStarted, StepDone, RunEnded)
"""What a record is a fold of: few lines of a log."""


class InterruptedRunError(Exception):
    """A run that was stopped from outside (a signal, a closed terminal); its text is the command that continues it."""


@dataclass
class Attempt:
    """One call of `cohort run`."""

    start: RunStarted
    status: Status = "running"
    seconds: float = 0.0
    executed: int = 0
    cached: int = 0
    error: str = ""

    def take(self, event: Event) -> None:
        """Note an event of this attempt."""
        self.seconds = max(0.0, event.time - self.start.time)
        if isinstance(event, RunEnded):
            self.status, self.error, self.seconds = event.status, event.error, event.seconds
            self.executed, self.cached = event.executed, event.cached

    @property
    def is_here(self) -> bool:
        """Whether its process is, or was, on this machine."""
        return self.start.host == socket.gethostname()

    def outcome(self) -> Status:
        """Return the status; a run whose process is gone without a word was killed."""
        ours = self.status == "running" and self.is_here
        return "killed" if ours and not is_alive(self.start.pid, self.start.process_start) else self.status


@dataclass
class RunRecord:
    """What is kept of a run; `take` is a fold."""

    folder: Path
    name: str = ""
    total_steps: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    """All calls, by their start."""
    steps: int = 0
    """Steps that were reached, by any attempt."""
    policy: str = ""
    """Digest of the final policy, once there is one."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    """`before`, `best` and `final` by set, as the summary has them."""
    finished_before: bool = False
    """Whether an earlier attempt finished: then this one most likely reuses everything."""
    log: EventLog = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.log = EventLog(self.folder)

    @classmethod
    def begin(
        cls,
        places: Places,
        config: IterativeRLConfig,
        *,
        command: str,
        engine: str,
        asked: Asked | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunRecord:
        """Note that an attempt starts; the record's log is open for its events.

        Args:
            asked: what the configuration was made from.
            params: the configuration by dotted key, as MLflow gets it.
            tags: what MLflow gets with the configuration.

        Raises:
            StoreError: the folder cannot be written.
        """
        from flows.config.resolve import Asked  # here, since the sender reads records and needs no configuration

        folder = run_folder(places, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", config.to_yaml())
            (folder / IMPORTED).unlink(missing_ok=True)
            record = read_record(folder) or cls(folder)
            record.finished_before = record.finished
            event = RunStarted(
                config.name,
                config.experiment,
                config.iterations * config.steps,
                config.iterations,
                command,
                engine,
                socket.gethostname(),
                os.getpid(),
                start_of(os.getpid()),
                **(asked or Asked()).model_dump(mode="json"),
                params=dict(params or {}),
                tags=dict(tags or {}),
                time=time.time(),
                attempt=record.log.attempt,
            )
            record.log.append(event)
            record.take(event)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written ({error.strerror or error}): free space, fix permissions or choose another "
                "place with --root"
            ) from None
        return record

    def end(self, status: Literal["finished", "failed", "interrupted"], state: RunState, error: str = "") -> None:
        """Note how the attempt ended; a folder that cannot be written does not stop it."""
        ended = RunEnded(status, state.elapsed, state.executed, state.cached, error, self.policy, **self.accuracy)
        with failsafe(f"the end of the log of {self.folder}"):
            self.log.take(ended)
        self.take(dataclasses.replace(ended, time=time.time(), attempt=self.log.attempt))

    def take(self, event: Event) -> None:
        """Note one event."""
        match event:
            case RunStarted():
                self.name, self.total_steps = event.name, event.total_steps
                self.attempts.append(Attempt(event))
                self.attempts.sort(key=lambda attempt: attempt.start.time)
            case StepDone():
                self.steps = max(self.steps, event.step)
            case RunEnded():
                self.policy = event.policy or self.policy
                outcome = {"before": event.before, "best": event.best, "final": event.final}
                self.accuracy = outcome if any(outcome.values()) else self.accuracy
        for attempt in self.attempts:
            if attempt.start.attempt == event.attempt:
                attempt.take(event)

    @property
    def is_running(self) -> bool:
        """Whether the attempt of this process has not ended."""
        return any(
            attempt.start.attempt == self.log.attempt and attempt.status == "running" for attempt in self.attempts
        )

    @property
    def open(self) -> bool:
        """Whether any attempt may go on: its process lives, or is on another machine."""
        return any(attempt.outcome() == "running" for attempt in self.attempts)

    @property
    def lives(self) -> bool:
        """Whether a process of this machine is at work on it."""
        return any(attempt.is_here and attempt.outcome() == "running" for attempt in self.attempts)

    @property
    def finished(self) -> bool:
        """Whether any attempt finished: what it came to is in the store."""
        return any(attempt.status == "finished" for attempt in self.attempts)


def run_folder(places: Places, config: IterativeRLConfig) -> Path:
    """Where the record of a configuration lies; what a run keeps of its payloads is no part of which run it is."""
    digest = sha256_of(canonical_json(config.identity()))
    return places.runs / f"{config.name}-{digest[:8]}"


def read_records(places: Places) -> Iterator[RunRecord]:
    """All records that can be read, the run that was started last at the end."""
    records = [record for folder in places.runs.glob("*/") if (record := read_record(folder)) is not None]
    yield from sorted(records, key=lambda record: record.attempts[-1].start.time)


def unreadable_records(places: Places) -> dict[Path, str]:
    """The logs that are there and say of no attempt, and why; they hinder no other run."""
    found = {}
    for folder in sorted(places.runs.glob("*/")):
        if (folder / LOG).exists() and read_record(folder) is None:
            try:
                parse_record(folder)
            except (OSError, ValueError) as error:
                found[folder / LOG] = str(error)
    return found


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder; None when there is none, or none that can be read."""
    reader = LogReader(folder / LOG)
    try:
        record = _folded(folder, reader.new(kinds=_OF_RECORDS))
    except (OSError, ValueError):
        return None
    reader.warn()
    return record


def parse_record(folder: Path) -> RunRecord:
    """The record in a folder that others bring.

    Raises:
        OSError: there is none.
        ValueError: an event of the log lacks a field, or has one of another type or beyond what a run can come to.
    """
    return _folded(folder, parse_events(folder / LOG))


def _folded(folder: Path, events: Iterable[Event]) -> RunRecord:
    record = RunRecord(folder)
    for event in events:
        record.take(event)
    if not record.attempts:
        raise ValueError("expected the start of an attempt (RunStarted), found none")
    return record


def read_artifacts(folder: Path) -> dict[str, str]:
    """Digest -> stage of what a run computed or reused."""
    with contextlib.suppress(OSError):
        events = read_events(folder / LOG, kinds=(StageDone,))
        return {event.result: event.stage for event in events if isinstance(event, StageDone)}
    return {}


def check_folder(folder: Path) -> None:
    """Raise ValueError where the folder of a run that others bring holds what no run writes, or a log of wrong types."""
    for file in sorted(folder.iterdir()):
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{file.name}: expected files that end in {', '.join(_SUFFIXES)}")
    if (folder / LOG).exists():
        parse_record(folder)


def read_digests(file: Path) -> set[str]:
    """The digests that an `ARTIFACTS` file of a study names; whatever else it holds is left out."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
    return {digest for digest in found if is_digest(digest)} if isinstance(found, dict) else set()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file of JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a crash, sees the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, and leave no draft where that fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
