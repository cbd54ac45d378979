"""The process that sends logs to MLflow's database while training runs.

MLflow costs seconds to import and 10-35 ms a step; in a process of its own it takes neither the interpreter lock nor the
memory of training, and no failure of a tracking server reaches training. It serves every log of a project, ends when no run
lives and all is sent (or cannot be sent), and marks runs whose process died as KILLED.

    python -m flows.tracking.sender <root>
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

from flows.runs.paths import Places
from flows.runs.record import IMPORTED, read_record
from flows.tracking.fold import MlflowFold, starts_of
from pipeline.config.text import unspoken, without_password
from pipeline.event_log import LOG
from pipeline.store import use_store
from pipeline.store.locks import lock_file, locked
from pipeline.tracking.database import adopt, artifact_folder, connect, local_database, tracking_uri
from pipeline.tracking.records import Sent
from pipeline.tracking.run import MlflowRun

POLL_SECONDS: Final = 0.3
BATCH_SECONDS: Final = 5.0
"""Points of a living run are gathered for so long: a batch of ten steps costs a quarter of ten batches."""
RETRY_SECONDS: Final = 10.0
LINGER_SECONDS: Final = 5.0
"""The next arm of an experiment finds the process still warm."""
TRIES: Final = 3
"""After so many failures in a row a run that has ended is left to `cohort mlflow sync`."""

_OPEN: Final = ("", "RUNNING")
"""Statuses in MLflow of a run that has not ended."""
_children: dict[tuple[Path, str], subprocess.Popen[bytes]] = {}  # by home and tracking URI


def folder_of(home: Path) -> Path:
    """Return where the logs of studies lie, and what the sending process needs."""
    return home / "tracking"


def logs_of(home: Path) -> list[Path]:
    """Return the folders with a log: runs, but for those of an archive that were not asked for here, and studies."""
    logs = [*home.glob(f"runs/*/{LOG}"), *folder_of(home).glob(f"*/{LOG}")]
    return sorted(log.parent for log in logs if not (log.parent / IMPORTED).exists() and log.stat().st_size)


def start_sender(home: Path) -> None:
    """Start the sending process in a session of its own, so that Ctrl-C reaches training only; one is enough."""
    uri = tracking_uri(home)
    if (child := _children.get((home, uri))) and child.poll() is None:
        return  # it sends as long as a run of this process lives, and for a while after
    command = [sys.executable, "-m", "flows.tracking.sender", str(home)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}  # not an argument: those are for all to see
    place = Path(__file__).parents[2]  # `-m` finds this package there, installed or not
    folder_of(home).mkdir(parents=True, exist_ok=True)
    with open(folder_of(home) / "sync.log", "ab") as log:
        _children[home, uri] = subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class Sender:
    """Sends the logs of one project to one tracking URI; connects when there is something to send."""

    def __init__(self, home: Path, uri: str) -> None:
        self.home = home
        self.uri = uri
        self._place = without_password(uri)
        self._store = Places(home).open_store()
        self._client: Any = None
        self._connected_to = -1
        self._runs: dict[Path, MlflowRun] = {}
        self._folds: dict[Path, MlflowFold] = {}
        self._not_before: dict[Path, float] = {}
        self._failures: dict[Path, int] = {}
        self._attempted_alive: set[Path] = set()

    def follow(self) -> None:
        """Send until no run has lived for a while and all is sent, or cannot be."""
        ends = time.monotonic() + LINGER_SECONDS
        while True:
            pending, living = self._look()
            ends = time.monotonic() + LINGER_SECONDS if living else ends
            for folder in pending:
                ended = folder in self._attempted_alive and folder not in living  # its process waits: now
                if ended or time.monotonic() >= self._not_before.get(folder, 0.0):
                    with contextlib.suppress(FileNotFoundError):
                        self._attempt(folder, living)
            idle = all(self._failures.get(folder, 0) >= TRIES for folder in pending)
            if (idle and time.monotonic() > ends) or self._was_replaced():
                return
            time.sleep(POLL_SECONDS)

    def project(self, folder: Path) -> str:
        """Send what one log holds beyond what was sent; returns the error, which its state keeps too, or nothing.

        One process at a time: two would send the same records, and make the same versions of models, twice.
        """
        folder_of(self.home).mkdir(parents=True, exist_ok=True)
        with locked(folder_of(self.home) / f"sending-{place_of(self.uri)}.lock"):
            sent = self._state(folder)
            try:
                self._send(folder, sent)
            except Exception as error:  # whatever MLflow or its server does, training and the other logs go on
                self._runs.pop(folder, None)
                lines = str(error).strip().splitlines() or [""]
                text = f"{type(error).__name__}: {unspoken(lines[0], self.uri)}"[:250]
                dataclasses.replace(sent, error=text, tried=time.time()).write(folder)
                return text
        return ""

    def delete(self, folder: Path) -> None:
        """Delete the run of a log in MLflow; everything is sent again when it is next projected."""
        if run := self._state(folder).run_id:
            self._connected().delete_run(run)
        Sent(self._place).write(folder)
        self._runs.pop(folder, None)

    def _look(self) -> tuple[list[Path], set[Path]]:
        """Return the logs with something to send (events, or the death of their writer), and those being written here."""
        pending, living = [], set()
        for folder in logs_of(self.home):
            if Sent.read(folder).uri != self._place:
                continue  # of another sending process; only `sync` moves old runs to another server
            sent = self._state(folder)
            with contextlib.suppress(FileNotFoundError):  # a run that is being deleted
                whole = sent.size == (folder / LOG).stat().st_size
                if whole and sent.status not in _OPEN:
                    continue
                record = self._fold(folder, sent).record
                if record.lives:
                    living.add(folder)
                if not whole or not record.open:
                    pending.append(folder)
        return pending, living

    def _attempt(self, folder: Path, living: set[Path]) -> None:
        self._attempted_alive = (self._attempted_alive | {folder}) & living
        failed = bool(self.project(folder))
        self._failures[folder] = self._failures.get(folder, 0) + 1 if failed else 0
        pause = RETRY_SECONDS if failed else BATCH_SECONDS if folder in living else 0.0
        self._not_before[folder] = time.monotonic() + pause

    def _send(self, folder: Path, sent: Sent) -> None:
        run = self._run(folder)
        if sent.run_id not in ("", run.id):  # deleted by the user: the new run gets everything
            sent = Sent(self._place)
        size = (folder / LOG).stat().st_size
        if (sent.run_id, sent.size) == (run.id, size) and sent.status not in _OPEN:
            return
        fold = self._fold(folder, sent)
        if not fold.record.open:
            fold = self._fold(folder, sent)  # an end that was written between the two looks
        status = "RUNNING" if fold.status in _OPEN and fold.record.open else fold.status
        status = "KILLED" if status in _OPEN and not fold.record.open else status
        if status == "RUNNING" and run.status != "RUNNING":
            run.set_status("RUNNING", None)
        records, hashes = sent.unsent(fold.records)
        run.send(records)
        if status != run.status:
            run.set_status(status, int(fold.time * 1000))
        fold.note_sent()
        Sent(self._place, self._database(), run.id, fold.number, size, status, hashes=hashes).write(folder)

    def _state(self, folder: Path) -> Sent:
        """Return how far a log was sent: another database gets everything, and what it has already is left out."""
        sent = Sent.read(folder)
        target = sent.uri == self._place and sent.database == self._database()
        return sent if target else Sent(self._place)

    def _fold(self, folder: Path, sent: Sent) -> MlflowFold:
        """Return the fold of a log, as far as it is written, with what is not sent."""
        fold = self._folds.get(folder)
        if fold is None or fold.sent != sent.number:
            fold = self._folds[folder] = MlflowFold(folder, sent.number)
        with use_store(self._store):
            fold.read()
        return fold

    def _run(self, folder: Path) -> MlflowRun:
        if folder not in self._runs:
            starts = starts_of(folder)
            if not starts:
                raise ValueError("no line says which run it is of: it is damaged; the next start of the run writes one")
            run = starts[-1] | {"time": starts[0]["time"]}
            self._runs[folder] = MlflowRun(self._connected(), run, artifact_folder(self.uri, self.home))
        return self._runs[folder]

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

    def _database(self) -> int:
        database = local_database(self.uri)
        with contextlib.suppress(FileNotFoundError):
            return database.stat().st_ino if database else 0
        return -2  # not there yet, or deleted


def place_of(uri: str) -> str:
    """Return a tracking URI as part of a file name."""
    return hashlib.sha256(without_password(uri).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class SyncReport:
    """What `sync` did."""

    sent: int
    """Runs that MLflow now has completely."""
    living: int
    """Runs left to the process that is sending them."""
    errors: dict[str, str]
    """Error by log."""


def sync(home: Path, *, rebuild: bool = False) -> SyncReport:
    """Send every log to the tracking URI in force; with `rebuild`, delete the runs there first."""
    home = home.resolve()
    found = logs_of(home)
    idle = [folder for folder in found if not ((record := read_record(folder)) and record.lives)]
    if not idle:
        return SyncReport(0, len(found), {})
    sender = Sender(home, tracking_uri(home))
    if rebuild:  # all, before any is sent: a version of a model leads to the run that came to it first
        for folder in idle:
            sender.delete(folder)
    errors = {str(folder / LOG): sender.project(folder) for folder in idle}
    failed = {log: error for log, error in errors.items() if error}
    return SyncReport(len(idle) - len(failed), len(found) - len(idle), failed)


def main(home: Path) -> None:
    """Send as the project's only process, or wait as its successor; end where both are there."""
    os.nice(5)  # training goes first
    folder, uri = folder_of(home), tracking_uri(home)
    name = f"sync-{place_of(uri)}"  # one for each place that is sent to
    with open(folder / f"{name}.lock", "w") as working:
        with open(folder / f"{name}.next.lock", "w") as waiting:
            if not lock_file(waiting, seconds=0.0):
                return  # the one that waits already will see every log that is there now
            lock_file(working)
        Sender(home, uri).follow()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
