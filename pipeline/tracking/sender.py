"""The process that sends journals to MLflow's database while training runs.

MLflow costs seconds to import and 10-35 ms a step; in a process of its own it takes neither the interpreter lock nor the
memory of training, and no failure of a tracking server reaches training. It serves every journal of a project, ends when no
run lives and all is sent (or cannot be sent), and marks runs whose process died as KILLED.

    python -m pipeline.tracking <folder of the store>
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from pipeline.config.passwords import unspoken, without_password
from pipeline.store.locks import locked
from pipeline.tracking.database import adopt, artifact_folder, connect, local_database, tracking_uri
from pipeline.tracking.journal import Record, Sent, is_live, journals, read_records
from pipeline.tracking.run import MlflowRun

__all__ = ["Sender", "folder_of", "start_sender"]

POLL_SECONDS: Final = 0.3
BATCH_SECONDS: Final = 5.0
"""Points of a living run are gathered for so long: a batch of ten steps costs a quarter of ten batches."""
RETRY_SECONDS: Final = 10.0
LINGER_SECONDS: Final = 5.0
"""The next arm of an experiment finds the process still warm."""
TRIES: Final = 3
"""After so many failures in a row a run that has ended is left to `cohort mlflow sync`."""


_children: list[subprocess.Popen[bytes]] = []  # kept until they end, so that they are reaped


def folder_of(home: Path) -> Path:
    """Where the journals of a project lie."""
    return home / "tracking"


def start_sender(home: Path) -> None:
    """Start the sending process in a session of its own, so that Ctrl-C reaches training only; one is enough."""
    command = [sys.executable, "-m", "pipeline.tracking", str(home)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(home)}  # not an argument: those are for all to see
    place = Path(__file__).parents[1]  # `-m` finds this package there, installed or not
    with open(folder_of(home) / "sync.log", "ab") as log:
        child = subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _children[:] = [*(other for other in _children if other.poll() is None), child]


class Sender:
    """Sends the journals of one project to one tracking URI; connects when there is something to send."""

    def __init__(self, home: Path, uri: str) -> None:
        self.home = home
        self.uri = uri
        self._place = without_password(uri)
        self._client: Any = None
        self._connected_to = -1
        self._runs: dict[Path, MlflowRun] = {}
        self._not_before: dict[Path, float] = {}
        self._failures: dict[Path, int] = {}
        self._attempted_alive: set[Path] = set()

    def follow(self) -> None:
        """Send until no run has lived for a while and all is sent, or cannot be."""
        ends = time.monotonic() + LINGER_SECONDS
        while True:
            living = {journal for journal in journals(folder_of(self.home)) if is_live(journal)}
            ends = time.monotonic() + LINGER_SECONDS if living else ends
            pending = self.pending(living)
            for journal in pending:
                ended = journal in self._attempted_alive and journal not in living  # its process waits: now
                if ended or time.monotonic() >= self._not_before.get(journal, 0.0):
                    self._attempt(journal, living)
            idle = all(self._failures.get(journal, 0) >= TRIES for journal in pending)
            if (idle and time.monotonic() > ends) or self._was_replaced():
                return
            time.sleep(POLL_SECONDS)

    def pending(self, living: set[Path]) -> list[Path]:
        """Journals with something to send: records, or the death of their writer."""
        return [journal for journal in journals(folder_of(self.home)) if self._is_pending(journal, journal in living)]

    def project(self, journal: Path) -> str:
        """Send what one journal holds beyond what was sent; returns the error, which its state keeps too, or nothing.

        One process at a time: two would send the same records, and make the same versions of models, twice.
        """
        with locked(folder_of(self.home) / f"sending-{place_of(self.uri)}.lock"):
            return self._project(journal)

    def _project(self, journal: Path) -> str:
        sent = Sent.read(journal)
        if not self._is_target(sent):  # another database: from the beginning; what it has already is left out
            sent = Sent(self._place)
        try:
            self._send(journal, sent)
        except Exception as error:  # whatever MLflow or its server does, training and the other journals go on
            self._runs.pop(journal, None)
            lines = str(error).strip().splitlines() or [""]
            sent.error = f"{type(error).__name__}: {unspoken(lines[0], self.uri)}"[:250]
            sent.tried = time.time()
            sent.write(journal)
            return sent.error
        return ""

    def delete(self, journal: Path) -> None:
        """Delete the run of a journal in MLflow; everything is sent again when it is next projected."""
        sent = Sent.read(journal)
        if sent.run_id and self._is_target(sent):
            self._connected().delete_run(sent.run_id)
        Sent(self._place).write(journal)
        self._runs.pop(journal, None)

    def _attempt(self, journal: Path, living: set[Path]) -> None:
        self._attempted_alive = (self._attempted_alive | {journal}) & living
        failed = bool(self.project(journal))
        self._failures[journal] = self._failures.get(journal, 0) + 1 if failed else 0
        pause = RETRY_SECONDS if failed else BATCH_SECONDS if journal in living else 0.0
        self._not_before[journal] = time.monotonic() + pause

    def _send(self, journal: Path, sent: Sent) -> None:
        live = is_live(journal)  # before reading: an end written just before the lock was released is then seen
        run = self._run(journal)
        gone = sent.run_id not in ("", run.id)  # deleted by the user: the new run gets everything
        records, offset = read_records(journal, 0 if gone else sent.offset)
        status = _status(records, sent.status, live)
        if status == "RUNNING" and run.status != "RUNNING":
            run.set_status("RUNNING", None)
        run.send(records)
        if status != run.status:
            ended = max((record["time"] for record in records if "time" in record), default=time.time())
            run.set_status(status, int(ended * 1000))
        Sent(self._place, self._database(), run.id, offset, status).write(journal)

    def _run(self, journal: Path) -> MlflowRun:
        if journal not in self._runs:
            runs = [record for record in read_records(journal, 0)[0] if record["kind"] == "run"]
            if not runs:
                raise ValueError("no line says which run it is of: it is damaged; the next start of the run writes one")
            self._runs[journal] = MlflowRun(self._connected(), runs[-1], artifact_folder(self.uri, self.home))
        return self._runs[journal]

    def _connected(self) -> Any:
        if self._client is None:
            self._client = connect(self.uri)
            if database := local_database(self.uri):
                adopt(database, self.home)
            self._connected_to = self._database()
        return self._client

    def _was_replaced(self) -> bool:
        """Whether the database file is another by now: MLflow would write to the old one as long as this process lives."""
        return self._client is not None and self._database() != self._connected_to

    def _is_pending(self, journal: Path, live: bool) -> bool:
        sent = Sent.read(journal)
        if sent.uri != self._place:
            return False  # of another sending process; only `sync` moves old runs to another server
        died = sent.status == "RUNNING" and not live
        return died or not self._is_target(sent) or journal.stat().st_size > sent.offset

    def _is_target(self, sent: Sent) -> bool:
        return sent.uri == self._place and sent.database == self._database()

    def _database(self) -> int:
        database = local_database(self.uri)
        with contextlib.suppress(FileNotFoundError):
            return database.stat().st_ino if database else 0
        return -2  # not there yet, or deleted


def _status(records: list[Record], status: str, live: bool) -> str:
    for record in records:
        if record["kind"] in ("start", "end"):
            status = record.get("status", "RUNNING")
    if live:
        return status or "RUNNING"
    return "KILLED" if status in ("", "RUNNING") else status


def place_of(uri: str) -> str:
    """A tracking URI as part of a file name."""
    return hashlib.sha256(without_password(uri).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class SyncReport:
    """What `sync` did."""

    sent: int
    """Runs that MLflow now has completely."""
    living: int
    """Runs left alone because their process sends them itself."""
    errors: dict[str, str]
    """Error by journal."""


def sync(home: Path, *, rebuild: bool = False) -> SyncReport:
    """Send every journal to the tracking URI in force; with `rebuild`, delete the runs there first."""
    home = home.resolve()
    sender = Sender(home, tracking_uri(home))
    found = list(journals(folder_of(home)))
    idle = [journal for journal in found if not is_live(journal)]
    if rebuild:  # all, before any is sent: runs name the run they stand under
        for journal in idle:
            sender.delete(journal)
    errors = {str(journal): sender.project(journal) for journal in idle}
    failed = {journal: error for journal, error in errors.items() if error}
    return SyncReport(len(idle) - len(failed), len(found) - len(idle), failed)
