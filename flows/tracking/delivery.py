"""What a training process does for MLflow: it starts the process that sends, and waits a little for it at the end.

A repeated run that has nothing new starts no process and never imports mlflow. A tracking server that fails, hangs or is killed
costs training nothing: the log keeps the points, a warning says so once, and the next run or `cohort mlflow sync` sends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from flows.runs.record import InterruptedRunError
from flows.tracking.fold import STATUS, outcome_of, starts_of
from flows.tracking.sender import start_sender
from pipeline.config import flatten
from pipeline.config.text import without_password
from pipeline.event_log import LOG, EventLog
from pipeline.events import Event, Logged, RunEnded, RunStarted, StageDone
from pipeline.orchestration.interruption import check, is_interruption, shielded
from pipeline.orchestration.server_process import start_of
from pipeline.progress import failsafe
from pipeline.tracking.database import tracking_uri
from pipeline.tracking.records import Record, Sent

Ended = Literal["finished", "failed", "interrupted"]

CLOSE_SECONDS: Final = 20.0
"""How long the end of a run waits for its last points to arrive; after that they arrive without it."""

_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Delivery:
    """Has the log of an attempt sent while it is written; `take` is a fold."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._home = folder, folder.parents[1]
        self._news = False
        """Whether there are new points."""
        self._sent = Sent()
        """What MLflow had when the attempt began."""

    @failsafe("the delivery to MLflow")
    def begin(self) -> None:
        """Have the log sent, unless MLflow has all of it from an attempt that finished."""
        _warn_of_drift(starts_of(self._folder))
        uri = without_password(tracking_uri(self._home))
        self._sent = Sent.read(self._folder)
        if self._sent.uri != uri:
            self._sent = Sent(uri)
            self._sent.write(self._folder)
        if self._sent.status != "FINISHED":
            start_sender(self._home)

    def take(self, event: Event) -> None:
        """Have the log sent from the first stage on that computes."""
        if isinstance(event, StageDone) and not event.cached:
            self.announce()

    def announce(self) -> None:
        """Start the sending process, once: there is something new."""
        if not self._news:
            self._news = True
            start_sender(self._home)

    @failsafe("the delivery to MLflow")
    def close(self, status: str) -> None:
        """Have the end of the attempt sent, where anything is new; of new points, wait until they have arrived."""
        views = [*starts_of(self._folder)[-1:], *outcome_of(self._folder)]
        missing = self._sent.status != STATUS[status] or self._sent.error or self._sent.unsent(views)[0]
        if not (self._news or missing):
            return
        start_sender(self._home)  # the first may have ended since, or been killed
        # Who interrupts a run does not want to wait for it.
        if self._news and status != "interrupted":
            _await_delivery(self._home, self._folder)


@contextlib.contextmanager
def tracked_study(
    home: Path,
    *,
    experiment: str,
    name: str,
    key: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> Iterator[Callable[[Record], None]]:
    """Have what is no run tracked as one: a study, or an experiment as a whole; yields what logs a record.

    Args:
        home: folder of the store and of the database (`artifacts`).
        experiment: the study that runs are compared in.
        key: identity: calls with one key continue one MLflow run. Letters, digits and `._-`.
        config: parameters, nested (`config.model_dump(mode="json")`); those of the first call stay.
        tags: what should be searchable.
    """
    for field, value in (("experiment", experiment), ("key", key)):
        if not _KEY.fullmatch(value):
            raise ValueError(f"{field}: expected letters, digits and ._-, found {value!r}")
    pid, began = os.getpid(), time.time()
    place = (socket.gethostname(), pid, start_of(pid))
    start = RunStarted(name, experiment, 0, 0, "", "", *place, params=as_params(config), tags=dict(tags or {}))
    log = EventLog(home.resolve() / "tracking" / key)
    number = 0
    with failsafe("the log of this study"):
        log.file.parent.mkdir(parents=True, exist_ok=True)
        number = log.append(start)

    def add(record: Record) -> None:
        about = {field: value for field, value in record.items() if field not in ("kind", "name")}
        with failsafe(f"{record['kind']} {record['name']} of this study"):
            if log.append(Logged(record["kind"], record["name"], about)) > number:
                delivery.announce()

    with delivered(
        log.file.parent, lambda status, error: log.take(RunEnded(status, time.time() - began, error=error))
    ) as delivery:
        yield add


@contextlib.contextmanager
def delivered(folder: Path, end: Callable[[Ended, str], None]) -> Iterator[Delivery]:
    """Have an attempt that began in the log of a folder end there, however it ends, and be sent to MLflow.

    Args:
        end: appends the end of the attempt, with the error behind it, to the log.
    """
    delivery, ended = Delivery(folder), False
    try:
        delivery.begin()
        yield delivery
        check()
        with shielded():
            end("finished", "")
            ended = True
        delivery.close("finished")
    except BaseException as error:
        if ended:  # only the wait for MLflow was interrupted
            raise
        stopped = is_interruption(error) or isinstance(error, InterruptedRunError | SystemExit | GeneratorExit)
        status: Ended = "interrupted" if stopped else "failed"
        with shielded():
            known = KeyboardInterrupt() if isinstance(error, InterruptedRunError) else error
            end(status, without_password(f"{type(known).__name__}: {known}")[:2000])
        delivery.close(status)
        raise


def as_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested values as MLflow's parameters: text by dotted key."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flatten(values).items()}


def _warn_of_drift(starts: list[Record]) -> None:
    """Warn where an attempt has other parameters than the run was started with: MLflow refuses to change one."""
    now, known = starts[-1]["params"], dict[str, str]()
    for earlier in starts:
        known = {**earlier["params"], **known}
    drift = sorted(key for key, value in now.items() if known[key] != value)
    if drift:
        changes = "; ".join(f"{key}: {known[key]} -> {now[key]}" for key in drift)
        warnings.warn(f"the tracked run was started with other parameters, MLflow keeps those: {changes}", stacklevel=4)


def _await_delivery(home: Path, folder: Path) -> None:
    """Wait until the last points are in MLflow; say once where they are when it does not take them."""
    closed, deadline = time.time(), time.monotonic() + CLOSE_SECONDS
    size = (folder / LOG).stat().st_size
    while time.monotonic() < deadline:
        sent = Sent.read(folder)
        if sent.size >= size and not sent.error:
            return
        if sent.error and sent.tried > closed:
            warnings.warn(
                f"MLflow ({without_password(tracking_uri(home))}) did not take all points of this run: {sent.error}. "
                f"Nothing is lost: they are in {folder / LOG}, and `cohort mlflow sync` sends them",
                stacklevel=5,
            )
            return
        time.sleep(0.05)
