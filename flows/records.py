"""The record of a run: a folder per configuration with config.yaml, record.json, summary.json and learning_curve.png.

The folder is named after the run and a hash of its whole configuration, so that two configurations of one name never share
one; running a configuration again adds an attempt to its record. Files are replaced in one step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from flows.config import IterativeRLConfig
from flows.config.resolve import Asked
from flows.places import Places
from flows.run_state import RunState
from pipeline.orchestration.server_process import is_alive, start_of
from pipeline.store import StoreError, canonical_json, sha256_of
from pipeline.store.actions import LONGEST, Digest, Label, complaint
from pipeline.store.files import is_digest
from pipeline.store.locks import locked

__all__ = [
    "ARTIFACTS",
    "IMPORTED",
    "Attempt",
    "RunRecord",
    "Status",
    "check_folder",
    "parse_record",
    "read_artifacts",
    "read_digests",
    "read_record",
    "read_records",
    "run_folder",
    "unreadable_records",
    "write_json",
]

Status = Literal["running", "finished", "failed", "interrupted", "killed"]
_FILE: Final = "record.json"
ARTIFACTS: Final = "artifacts.json"
"""What a run used: digest -> stage. Of a study it is `<its report's name>.artifacts.json`."""
IMPORTED: Final = "imported.json"
"""Stands in the folder of a run that came with an archive and was not asked for here since: nothing runs it by itself."""
_SUFFIXES: Final = (".json", ".jsonl", ".yaml", ".png", ".svg", ".md", ".html", ".csv", ".txt")
"""Of the files in a run's folder."""
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
    process_start: str
    """When the process started (`start_of`), which with pid and host names it beyond doubt."""
    host: str
    status: Status = "running"
    seconds: float = 0.0
    executed: int = 0
    cached: int = 0
    error: str = ""
    recipe: str = ""
    """The recipe, or the complete file, that the overrides were made to."""
    overrides: list[dict[str, Any]] = field(default_factory=list)
    """What was asked for, in its order (`flows/config/resolve.py: AskedOverride`)."""

    @property
    def identity(self) -> tuple[str, int, float]:
        """Which attempt this is."""
        return (self.host, self.pid, self.started)

    def outcome(self) -> Status:
        """The status; a run whose process is gone without a word was killed."""
        here = self.host == socket.gethostname()
        return (
            "killed"
            if self.status == "running" and here and not is_alive(self.pid, self.process_start)
            else self.status
        )


@dataclass
class RunRecord:
    """What is kept of a run."""

    folder: Path
    name: str
    total_steps: int
    attempts: list[Attempt]
    """All calls, by their start. The record of a running process ends with its own, whoever else runs the same."""
    steps: int = 0
    """Steps that were reached, by any attempt."""
    policy: str = ""
    """Digest of the final policy, once there is one."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    """`before`, `best` and `final` by set, as the summary has them."""
    _written: float = field(default=0.0, repr=False)

    @classmethod
    def begin(
        cls, places: Places, config: IterativeRLConfig, *, command: str, engine: str, asked: Asked | None = None
    ) -> RunRecord:
        """Note that an attempt starts.

        Args:
            asked: what the configuration was made from.

        Raises:
            StoreError: the folder cannot be written.
        """
        folder = run_folder(places, config)
        attempt = Attempt(
            time.time(),
            command,
            engine,
            os.getpid(),
            start_of(os.getpid()),
            socket.gethostname(),
            **(asked or Asked()).model_dump(mode="json"),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / "config.yaml", config.to_yaml())
            (folder / IMPORTED).unlink(missing_ok=True)
            known = read_record(folder)
            before = known.attempts if known else []
            record = cls(folder, config.name, config.iterations * config.steps, [*before, attempt])
            record._write()
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written ({error.strerror or error}): free space, mend permissions or choose another "
                "place with --root"
            ) from None
        return record

    @property
    def finished(self) -> bool:
        """Whether any attempt finished: what it came to is in the store."""
        return any(attempt.status == "finished" for attempt in self.attempts)

    @property
    def finished_before(self) -> bool:
        """Whether an earlier attempt finished: then this one most likely reuses everything."""
        return any(attempt.status == "finished" for attempt in self.attempts[:-1])

    def note(self, state: RunState, *, force: bool = False) -> None:
        """Note how far the running attempt came; a folder that cannot be written does not stop it."""
        if not force and time.monotonic() - self._written < _EVERY:
            return
        self._written = time.monotonic()
        mine = self.attempts[-1]
        mine.seconds, mine.executed, mine.cached = state.elapsed, state.executed, state.cached
        self.steps = max(self.steps, state.step)
        try:
            self._write()
        except OSError as error:
            warnings.warn(f"the record of this run is not up to date: {error}", stacklevel=2)

    def end(self, status: Status, state: RunState, error: str = "") -> None:
        """Note how the attempt ended, and which artifacts it used."""
        self.attempts[-1].status, self.attempts[-1].error = status, error
        self.list_artifacts(state)
        self.note(state, force=True)

    def list_artifacts(self, state: RunState) -> None:
        """Note which artifacts all attempts used: from now on they are this run's, whether it lives or not."""
        with contextlib.suppress(OSError):  # `note` says so
            write_json(self.folder / ARTIFACTS, read_artifacts(self.folder) | state.artifacts)

    def _write(self) -> None:
        """Write this record over the one on disk, keeping what other processes noted of their own attempts."""
        mine = self.attempts[-1]
        with locked(self.folder / ".lock"):
            known = read_record(self.folder)
            others = [a for a in known.attempts if a.identity != mine.identity] if known else []
            self.attempts = [*others, mine]
            if known:
                self.steps = max(self.steps, known.steps)
                self.policy, self.accuracy = self.policy or known.policy, self.accuracy or known.accuracy
            values = {key: value for key, value in asdict(self).items() if key not in ("folder", "_written")}
            write_json(self.folder / _FILE, values)


def run_folder(places: Places, config: IterativeRLConfig) -> Path:
    """Where the record of a configuration lies; what a run keeps of its payloads is no part of which run it is."""
    digest = sha256_of(canonical_json(config.identity()))
    return places.runs / f"{config.name}-{digest[:8]}"


def read_records(places: Places) -> Iterator[RunRecord]:
    """All records that can be read, the run that was started last at the end."""
    records = [record for folder in places.runs.glob("*/") if (record := read_record(folder)) is not None]
    yield from sorted(records, key=lambda record: record.attempts[-1].started)


def unreadable_records(places: Places) -> dict[Path, str]:
    """The records that are there and cannot be read, and why; they hinder no other."""
    found = {}
    for folder in sorted(places.runs.glob("*/")):
        try:
            parse_record(folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            found[folder / _FILE] = str(error)
    return found


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder; None when there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return parse_record(folder)
    return None


class _Accuracy(BaseModel):
    model_config = ConfigDict(strict=True)

    before: dict[Label, dict[Label, float | None]] = {}
    best: dict[Label, tuple[int, float | None]] = {}
    final: dict[Label, dict[Label, float | None]] = {}


class _Kept(BaseModel):
    """What record.json has beside its attempts: others may have written it."""

    model_config = ConfigDict(strict=True)

    name: Label
    total_steps: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)] = 0
    policy: Literal[""] | Digest = ""
    accuracy: _Accuracy = _Accuracy()


_ATTEMPTS: Final = TypeAdapter(Annotated[list[Attempt], Field(min_length=1)])


def parse_record(folder: Path) -> RunRecord:
    """The record in a folder.

    Raises:
        OSError: there is none.
        ValueError: it lacks a field, or has one of another type or beyond what a run can come to; names it.
    """
    values = _parsed((folder / _FILE).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found a {type(values).__name__}")
    try:
        # As text: of values, a strict check would take no dictionary for an attempt, nor a list for a pair.
        attempts = _ATTEMPTS.validate_json(json.dumps(values.pop("attempts", None)), strict=True)
        _Kept.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError(complaint(error)) from None
    for attempt in attempts:
        if not (0 < attempt.pid < 2**31 and 0 <= attempt.started < LONGEST and 0 <= attempt.seconds < LONGEST):
            raise ValueError("attempts: a process number, or a time, that no run has")
    try:
        attempts.sort(key=lambda attempt: attempt.started)
        return RunRecord(folder=folder, attempts=attempts, **values)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _parsed(text: str) -> Any:
    """JSON without the numbers that are none."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def read_artifacts(folder: Path) -> dict[str, str]:
    """Digest -> stage of what a run computed or reused; empty before its first end."""
    return dict(_pairs(folder / ARTIFACTS))


def check_folder(folder: Path) -> None:
    """Raise ValueError where the folder of a run that others bring holds what no run writes, or a record of wrong types."""
    for file in sorted(folder.iterdir()):
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{file.name}: expected files that end in {', '.join(_SUFFIXES)}")
    if (folder / _FILE).exists():
        parse_record(folder)
    if (file := folder / ARTIFACTS).exists() and dict(_pairs(file)) != _parsed(file.read_text("utf-8")):
        raise ValueError(f"{ARTIFACTS}: expected digests and stages")


def read_digests(file: Path) -> set[str]:
    """The digests that an `ARTIFACTS` file of a run or study names."""
    return {digest for digest, _ in _pairs(file)}


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        found = _parsed(file.read_text(encoding="utf-8"))
        for digest, stage in found.items() if isinstance(found, dict) else ():
            if is_digest(digest) and isinstance(stage, str):
                yield digest, stage


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file in one step: a reader, or a crash, sees the old text or the new one."""
    _replace(path, json.dumps(value, indent=1))


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
