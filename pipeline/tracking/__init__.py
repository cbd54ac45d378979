"""MLflow as a picture of a run: what the flow records is journalled here and projected by a process of its own.

    with track(home, experiment="arithmetic", run_name="grpo-s0", run_key=key, config=config) as tracker:
        tracker.log_step(step, {"reward/mean": 0.4, ...})

Exactly once: a run of the same key continues the same MLflow run, and a step it has is not written again; a fully cached run
writes nothing and never imports mlflow. A tracking server that fails, hangs or is killed costs training nothing: the journal
keeps the points, a warning says so once, and the next run or `sync` sends them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.config import flatten
from pipeline.config.passwords import without_password
from pipeline.orchestration.interruption import is_interruption
from pipeline.progress import failsafe
from pipeline.tracking.database import tracking_uri
from pipeline.tracking.journal import Journal, JournalBusyError, Record, Sent, read_records
from pipeline.tracking.registry import TrackedModel, alias_of
from pipeline.tracking.sender import SyncReport, folder_of, start_sender, sync

__all__ = ["SyncReport", "Tracker", "sync", "track", "tracked_models", "tracking_uri"]

CLOSE_SECONDS: Final = 20.0
"""How long the end of a run waits for its last points to arrive; after that they arrive without it."""

_METRIC_NAME: Final = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")  # what MLflow accepts
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Tracker:
    """What one run has to say to MLflow. Every method returns in microseconds and none raises for MLflow's sake."""

    def __init__(self, home: Path, journal: Journal | None) -> None:
        self._home = home
        self._journal = journal
        self._wrote = False
        self._points = False

    def log_step(self, step: int, metrics: Mapping[str, float | int | bool | None]) -> None:
        """Points of several curves at one step; None, NaN and infinity are left out.

        Steps of one metric ascend: a step at or below its last one is taken for a repetition and left out.
        """
        points = {}
        for name, value in metrics.items():
            if not _METRIC_NAME.fullmatch(name):
                warnings.warn(f"metric {name!r} is left out: expected letters, digits and _-. :/ only", stacklevel=2)
            elif value is not None and math.isfinite(value):
                points[name] = float(value)
        self._append({"kind": "step", "step": step, "time": time.time(), "metrics": points})

    def log_summary(self, metrics: Mapping[str, float | int | bool | None]) -> None:
        """Single figures such as `final/accuracy` and `best/accuracy`, at the last step: MLflow's table shows those."""
        last = max(self._journal.last_step.values(), default=0) if self._journal else 0
        self.log_step(last, metrics)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table for MLflow's artifact view; a table of the same name is replaced."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[_json_value(row.get(column)) for column in columns] for row in rows]
        self._append({"kind": "table", "name": name, "columns": columns, "data": data, "time": time.time()})

    def log_figure(self, path: Path) -> None:
        """A picture; one of the same file name is replaced."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self._append({"kind": "figure", "name": path.name, "path": str(path.resolve()), "digest": digest})

    def log_dataset(self, name: str, digest: str, *, context: str, rows: int) -> None:
        """A data set that the run reads, by digest.

        Args:
            context: what for: `training`, `evaluation`.
        """
        self._append({"kind": "dataset", "name": name, "digest": digest, "context": context, "rows": rows})

    def log_model(self, model: TrackedModel) -> None:
        """A model that the run came to: a version of the registered model, one for each digest, and an output of the run."""
        self._append(model.record())

    def set_alias(self, alias: str, model: TrackedModel, *, run_name: str, run_key: str) -> None:
        """Let an alias name the version of a model, which a run of the same experiment came to; an equal alias is moved."""
        if self._journal is None:
            return
        alias = alias_of(alias)
        # Whichever is sent first makes the run of the model in MLflow, where its start cannot be changed later.
        runs = [
            record for record in _records(self._journal.path.with_name(f"{run_key}.jsonl")) if record["kind"] == "run"
        ]
        began = runs[-1].get("time") if runs else None
        run = {"run": run_key, "run_name": run_name, "began": began, "model": model.record()}
        self._append({"kind": "alias", "name": f"{model.name}@{alias}", "alias": alias, **run})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags; equal keys are replaced."""
        self._append({"kind": "tags", "name": ",".join(sorted(tags)), "tags": dict(tags)})

    def set_note(self, markdown: str) -> None:
        """The description at the top of the run's page: command, what differs, the final table."""
        self.set_tags({"mlflow.note.content": markdown})

    def _append(self, record: Record) -> None:
        if self._journal is None:
            return
        try:
            wrote = self._journal.append(record)
            if wrote and not self._wrote:
                start_sender(self._home)
            self._wrote |= wrote
            self._points |= wrote and record["kind"] == "step"
        except OSError as error:
            warnings.warn(f"tracking stops, training goes on: {self._journal.path}: {error.strerror}", stacklevel=3)
            self._journal = None

    def _close(self, status: str, reason: str) -> None:
        if reason:
            self.set_tags({"cohort.status_reason": reason})
        self._append({"kind": "end", "status": status, "time": time.time()})
        if self._journal is None:
            return
        self._journal.close()
        if self._points and status != "KILLED":  # who interrupts a run does not want to wait for it
            _await_delivery(self._home, self._journal.path)
        self._journal = None


@contextlib.contextmanager
def track(
    home: Path,
    *,
    experiment: str,
    run_name: str,
    run_key: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> Iterator[Tracker]:
    """Track one arm with one seed for its whole training; records its end (FINISHED, FAILED, KILLED).

    Args:
        home: folder of the store and of the database (`artifacts`).
        experiment: the study that runs are compared in.
        run_key: the run's identity: calls with one key continue one MLflow run. Letters, digits and `._-`.
        config: parameters, nested (`config.model_dump(mode="json")`); written once. A difference from what the run was
            started with is reported by a warning and the tag `cohort.drift`.
        tags: what should be searchable; keep them equal from call to call.
    """
    for name, value in (("experiment", experiment), ("run_key", run_key)):
        if not _FILE_NAME.fullmatch(value):
            raise ValueError(f"{name}: expected letters, digits and ._-, found {value!r}")
    params = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flatten(config).items()}
    tracker = Tracker(home.resolve(), _open(folder_of(home.resolve()) / experiment / f"{run_key}.jsonl", params))
    name_and_key = {"name": run_name, "key": run_key, "experiment": experiment}
    tracker._append({"kind": "run", **name_and_key, "params": params, "tags": dict(tags or {}), "time": time.time()})
    try:
        yield tracker
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit) or is_interruption(error):
            failsafe("the tracker")(tracker._close)("KILLED", type(error).__name__)
        else:
            failsafe("the tracker")(tracker._close)(
                "FAILED", without_password(f"{type(error).__name__}: {error}")[:1000]
            )
        raise
    else:
        failsafe("the tracker")(tracker._close)("FINISHED", "")


def tracked_models(home: Path, experiment: str, run_key: str) -> list[TrackedModel]:
    """The models that a run came to, in the order in which they were first logged; none of a run that was not tracked."""
    records = _records(folder_of(home.resolve()) / experiment / f"{run_key}.jsonl")
    found = {record["name"]: record for record in records if record["kind"] == "model"}
    return [TrackedModel(part["model"], part["digest"], part["step"], part["tags"]) for part in found.values()]


def _records(journal: Path) -> list[Record]:
    return read_records(journal, 0)[0] if journal.is_file() else []


def _open(path: Path, params: Mapping[str, str]) -> Journal | None:
    try:
        journal = Journal(path)
    except (JournalBusyError, OSError) as error:
        warnings.warn(f"this run is not tracked, training goes on: {error}", stacklevel=4)
        return None
    uri = without_password(tracking_uri(path.parents[2]))
    if Sent.read(path).uri != uri:
        Sent(uri).write(path)
    drift = sorted(key for key, value in params.items() if journal.params.get(key, value) != value)
    if drift:
        changes = "; ".join(f"{key}: {journal.params[key]} -> {params[key]}" for key in drift)
        warnings.warn(f"the tracked run was started with other parameters, MLflow keeps those: {changes}", stacklevel=4)
    return journal


def _await_delivery(home: Path, journal: Path) -> None:
    """Wait until the last points are in MLflow; say once where they are when it does not take them."""
    start_sender(home)  # the first may have been killed since
    closed, deadline = time.time(), time.monotonic() + CLOSE_SECONDS
    size = journal.stat().st_size
    while time.monotonic() < deadline:
        sent = Sent.read(journal)
        if sent.offset == size and not sent.error:
            return
        if sent.error and sent.tried > closed:
            warnings.warn(
                f"MLflow ({without_password(tracking_uri(home))}) did not take all points of this run: {sent.error}. "
                f"Nothing is lost: they are in {journal}, and `cohort mlflow sync` sends them",
                stacklevel=5,
            )
            return
        time.sleep(0.05)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | types.NoneType) else str(value)
