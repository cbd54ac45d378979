"""Journals: what tracked runs recorded, one file of JSON lines a run, from which any MLflow database can be rebuilt.

The training process only appends (microseconds); a process of its own (`pipeline/tracking/sender.py`) reads the file and sends
it. The writer holds a lock on the file as long as it lives, so that a killed run is known as killed, whatever became of its
process id. Beside `<run_key>.jsonl` lies `<run_key>.sent.json`: how far it was projected, where to, and the last error.

Kinds of records: `run` (experiment, name, parameters, tags), `start`, `step` (metrics at a step), `table`, `figure`, `tags`,
`dataset`, `model` and `alias` (by digest), `end` (status). A line that is damaged is left out, and said when the run is next
started: what tracks training never stops it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

from pipeline.store.locks import is_locked, lock_file

__all__ = ["Journal", "JournalBusyError", "Record", "Sent", "is_live", "journals", "read_records"]

Record = dict[str, Any]

_NUMBER: Final = (int, float)
_FIELDS: Final[Mapping[str, Mapping[str, type | tuple[type, ...]]]] = {
    "run": {"experiment": str, "name": str, "key": str, "params": dict, "tags": dict},
    "start": {},
    "step": {"step": int, "time": _NUMBER, "metrics": dict},
    "table": {"name": str, "columns": list, "data": list},
    "figure": {"name": str, "path": str, "digest": str},
    "tags": {"name": str, "tags": dict},
    "dataset": {"name": str, "digest": str, "context": str, "rows": int},
    "model": {"name": str, "model": str, "digest": str, "step": int, "tags": dict},
    "alias": {"name": str, "alias": str, "run": str, "run_name": str, "model": dict},
    "end": {"status": str},
}
"""What a record of each kind has, whatever else it has."""
_LOCK_SECONDS: Final = 2.0  # readers probe the lock for an instant; only a lock held for longer has an owner


class JournalBusyError(RuntimeError):
    """Another living process writes the journal of this run."""


@dataclasses.dataclass
class Sent:
    """How far a journal was projected."""

    uri: str = ""
    """Tracking URI that it goes to, without its password: the one in force when the run was last started, or synchronised."""
    database: int = -1
    """inode of a local database file, since another file is another database; 0 for a server, -1 before all."""
    run_id: str = ""
    """The MLflow run."""
    offset: int = 0
    """Bytes of the journal that were sent."""
    status: str = ""
    """Status that the run has in MLflow; empty before the first."""
    error: str = ""
    """Why the last attempt failed; empty when it did not."""
    tried: float = 0.0
    """When that was, seconds since the epoch."""

    @classmethod
    def read(cls, journal: Path) -> Self:
        """The state of `journal`; nothing was sent when there is none, or when it is damaged."""
        try:
            found = cls(**json.loads(journal.with_suffix(".sent.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return cls()
        whole = all(type(getattr(found, field.name)) is type(field.default) for field in dataclasses.fields(cls))
        return found if whole and found.offset >= 0 else cls()

    def write(self, journal: Path) -> None:
        """Replace the state of `journal` in one step."""
        draft = journal.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(draft, journal.with_suffix(".sent.json"))


class Journal:
    """The journal of one run, open for appending; what it holds already is not written again.

    Raises:
        JournalBusyError: another process has it open.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.params: dict[str, str] = {}
        """Parameters as they were recorded first."""
        self.last_step: dict[str, int] = {}
        """Highest recorded step of each metric."""
        self.status = ""
        """`RUNNING` after a start, then what the end said."""
        self._latest: dict[str, str] = {}  # hash of the last record of each named thing
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (held, with its lock, until close)
        if not lock_file(self._file, seconds=_LOCK_SECONDS):
            self._file.close()
            raise JournalBusyError(f"another living process records this run ({path})")
        self._cut_torn_line()
        records, damaged = _parsed(path.read_bytes().split(b"\n")[:-1])
        for record in records:
            self._note(record)
        if damaged:
            lines = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
            warnings.warn(
                f"{path}: {lines} cannot be read and is left out of MLflow; training goes on, and the results are not touched",
                stacklevel=5,
            )

    def append(self, record: Record) -> bool:
        """Write a record unless it repeats what is there; whether it was written."""
        if record["kind"] == "step":
            fresh = {k: v for k, v in record["metrics"].items() if record["step"] > self.last_step.get(k, -1)}
            record = {**record, "metrics": fresh}
            if not fresh:
                return False
        elif self._latest.get(_name(record)) == _hash(record) or self._repeats_end(record):
            return False
        # A run that has ended runs again when it has new points, not when a note or a picture is replaced.
        if record["kind"] == "step" and self.status != "RUNNING":
            self.append({"kind": "start", "pid": os.getpid(), "time": time.time()})
        # One write of a whole line: a kill leaves all of it or nothing.
        os.write(self._file.fileno(), json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._note(record)
        return True

    def close(self) -> None:
        """Release the lock: the run is over, or its process is about to be."""
        self._file.close()

    def _note(self, record: Record) -> None:
        match record["kind"]:
            case "step":
                self.last_step |= {k: max(record["step"], self.last_step.get(k, -1)) for k in record["metrics"]}
            case "start":
                self.status = "RUNNING"
            case "end":
                self.status = record["status"]
            case "run":
                self.params = {**record["params"], **self.params}
                self._latest[_name(record)] = _hash(record)
            case _:
                self._latest[_name(record)] = _hash(record)

    def _repeats_end(self, record: Record) -> bool:
        return bool(record["kind"] == "end" and record["status"] == self.status)

    def _cut_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def read_records(path: Path, offset: int) -> tuple[list[Record], int]:
    """The whole records from byte `offset` on, without those that are damaged, and the offset behind them."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return _parsed(whole.split(b"\n")[:-1])[0], offset + len(whole)


def _parsed(lines: Sequence[bytes]) -> tuple[list[Record], list[int]]:
    """Records, and the numbers of the lines that are none, counted from 1."""
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def _is_record(found: Any) -> bool:
    fields = _FIELDS.get(str(found.get("kind"))) if isinstance(found, dict) else None
    if fields is None or not all(isinstance(found.get(name), kind) for name, kind in fields.items()):
        return False
    times = all(isinstance(found.get(name) or 0.0, _NUMBER) for name in ("time", "began"))
    metrics = all(isinstance(value, _NUMBER) and math.isfinite(value) for value in found.get("metrics", {}).values())
    texts = all(isinstance(text, str) for name in ("params", "tags") for text in found.get(name, {}).values())
    return times and metrics and texts


def journals(folder: Path) -> Iterator[Path]:
    """All journals under `folder` that hold a record."""
    yield from (path for path in sorted(folder.glob("*/*.jsonl")) if path.stat().st_size)


def is_live(path: Path) -> bool:
    """Return whether a live process writes the journal."""
    return bool(is_locked(path))


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['kind']}/{record.get('name', '')}"


def _hash(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "time"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
