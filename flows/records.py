"""The record of a run: a folder per configuration with config.yaml, record.json, summary.json and learning_curve.png.

The folder is named after the run and a hash of its whole configuration, so that two configurations of one name never share
one; running a configuration again adds an attempt to its record. Files are replaced in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from flows.config import IterativeRLConfig
from flows.places import Places
from flows.run_state import RunState
from pipeline.locking import locked
from pipeline.server_process import is_alive
from pipeline.store import canonical_json, sha256_of

__all__ = ["Attempt", "RunRecord", "Status", "read_artifacts", "read_records", "run_folder", "write_json"]

Status = Literal["running", "finished", "failed", "interrupted", "killed"]
_FILE: Final = "record.json"
_EVERY: Final = 2.0
"""A running record is rewritten at most so often (seconds)."""


@dataclass
class Attempt:
    """One call of `cohort run`."""

    started: float
    """Seconds since the epoch."""
    command: str
    engine: str
    pid: int
    created: float
    """Start time of the process, which with pid and host names it beyond doubt."""
    host: str
    status: Status = "running"
    seconds: float = 0.0
    executed: int = 0
    cached: int = 0
    error: str = ""

    def outcome(self) -> Status:
        """The status; a run whose process is gone without a word was killed."""
        here = self.host == socket.gethostname()
        return "killed" if self.status == "running" and here and not is_alive(self.pid, self.created) else self.status


@dataclass
class RunRecord:
    """What is kept of a run."""

    folder: Path
    name: str
    total_steps: int
    attempts: list[Attempt] = field(default_factory=list)
    steps: int = 0
    """Steps that were reached, by any attempt."""
    policy: str = ""
    """Digest of the final policy, once there is one."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    """`before`, `best` and `final` by set, as the summary has them."""
    _written: float = field(default=0.0, repr=False)

    @classmethod
    def begin(cls, places: Places, config: IterativeRLConfig, *, command: str, engine: str) -> RunRecord:
        """Note that an attempt starts."""
        folder = run_folder(places, config)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "config.yaml", config.to_yaml())
        attempt = Attempt(
            time.time(), command, engine, os.getpid(), psutil.Process().create_time(), socket.gethostname()
        )
        with locked(folder / ".lock"):
            record = read_record(folder) or cls(folder, config.name, config.iterations * config.steps)
            record.attempts.append(attempt)
            record._write()
        return record

    def note(self, state: RunState, *, force: bool = False) -> None:
        """Note how far the running attempt came."""
        if not force and time.monotonic() - self._written < _EVERY:
            return
        attempt = self.attempts[-1]
        attempt.seconds, attempt.executed, attempt.cached = state.elapsed, state.executed, state.cached
        self.steps = max(self.steps, state.step)
        self._write()

    def finished_before(self) -> bool:
        """Whether an earlier attempt finished: then this one most likely reuses everything."""
        return any(attempt.status == "finished" for attempt in self.attempts[:-1])

    def end(self, status: Status, state: RunState, error: str = "") -> None:
        """Note how the attempt ended, and which artifacts it used."""
        self.attempts[-1].status, self.attempts[-1].error = status, error
        known = read_artifacts(self.folder) | state.artifacts
        write_json(self.folder / "artifacts.json", known)
        self.note(state, force=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "_written")}
        write_json(self.folder / _FILE, values)


def run_folder(places: Places, config: IterativeRLConfig) -> Path:
    """Where the record of a configuration lies."""
    digest = sha256_of(canonical_json(config.model_dump(mode="json")))
    return places.runs / f"{config.name}-{digest[:8]}"


def read_records(places: Places) -> Iterator[RunRecord]:
    """All records, the run that was started last at the end."""
    records = [record for folder in places.runs.glob("*/") if (record := read_record(folder)) is not None]
    yield from sorted(records, key=lambda record: record.attempts[-1].started)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder; None when there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        attempts = [Attempt(**attempt) for attempt in values.pop("attempts")]
        return RunRecord(folder=folder, attempts=attempts, **values) if attempts else None
    return None


def read_artifacts(folder: Path) -> dict[str, str]:
    """Digest -> stage of what a run computed or reused; empty before its first end."""
    with contextlib.suppress(OSError, ValueError):
        found: Mapping[str, str] = json.loads((folder / "artifacts.json").read_text(encoding="utf-8"))
        return dict(found)
    return {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file in one step: a reader, or a crash, sees the old text or the new one."""
    _replace(path, json.dumps(value, indent=1))


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
