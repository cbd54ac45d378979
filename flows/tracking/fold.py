"""The fold of a log into the records that MLflow gets: parameters, curves, data, models, how the run ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from flows.runs.ledger import Ledger
from flows.runs.points import Points
from flows.runs.record import RunRecord
from flows.tracking.charts import charted
from flows.tracking.models import ModelsAndData
from pipeline.event_log import LOG, LogReader
from pipeline.events import Event, Logged, RunEnded, RunStarted
from pipeline.progress import failsafe
from pipeline.tracking.records import Record, figure, note, point, tags

STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""How an attempt ended -> the status of the run in MLflow."""
CURVE: Final = "learning_curve.png"
NOTE: Final = "note.md"
COMPLETIONS: Final = "completions.json"


class MlflowFold:
    """Folds a log as far as it is written. Events name calls; their metrics are read from the store in use."""

    def __init__(self, folder: Path, sent: int = 0) -> None:
        """Take the folder of a run or a study, and the number of the last event that was sent."""
        self.record = RunRecord(folder)
        self.records: list[Record] = []
        """What is to be sent."""
        self.status = ""
        """Status by the events alone; empty before the first point. A run is RUNNING where it has new points."""
        self.sent = sent
        self.number = 0
        """Number of the last event, and its time."""
        self.time = time.time()
        self._folder = folder
        self._reader = LogReader(folder / LOG)
        self._event = Event()
        self._last_step = 0
        self._ledger = Ledger()
        self._points = Points(log=lambda step, metrics: self._take_point(step, charted(metrics)))
        self._models = ModelsAndData(self._log)

    def read(self) -> None:
        """Note the events that were appended since; what cannot be read of one is left out, with a warning."""
        for event in self._reader.new():
            self._event = event
            for take in (self.record.take, self._ledger.take, self._points.take, self._models.take, self._take):
                with failsafe(f"event {event.number} of {self._folder}"):
                    take(event)
            self.number, self.time = event.number, event.time

    def note_sent(self) -> None:
        """Forget the records."""
        self.records, self.sent = [], self.number

    def _take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._log(_run_record(event, self._folder.name))
            case Logged(kind="step"):
                self._take_point(event.about["step"], event.about["metrics"])
            case Logged():
                self._log({"kind": event.kind, "name": event.name, **event.about})
            case RunEnded():
                self.status = STATUS[event.status]
                if event.error:
                    reason = event.error if event.status == "failed" else event.error.partition(":")[0]
                    self._log(tags({"cohort.status_reason": reason[:1000]}))
                if event.policy:
                    self._conclude(event)

    def _conclude(self, event: RunEnded) -> None:
        """Log what a run came to."""
        finals = {f"final/{name}/{key}": value for name, part in event.final.items() for key, value in part.items()}
        bests = {f"best/{name}/accuracy": accuracy for name, (_, accuracy) in event.best.items()}
        # At the last step: MLflow's table shows those.
        self._log(point(self._last_step, {k: v for k, v in finals.items() if k.endswith("accuracy")} | bests))
        self._log(tags({"cohort.policy": event.policy}))
        self._models.conclude(event, self._ledger)
        for record in outcome_of(self._folder):
            self._log(record)

    def _take_point(self, step: int, metrics: Mapping[str, float]) -> None:
        self.status = "RUNNING"
        self._last_step = max(step, self._last_step)
        self._log(point(step, metrics))

    def _log(self, record: Record) -> None:
        if self._event.number > self.sent:
            self.records.append({**record, "time": self._event.time})


def starts_of(folder: Path) -> list[Record]:
    """Return what MLflow calls a run (experiment, name, parameters, tags) as each attempt has it."""
    events = LogReader(folder / LOG).new(kinds=(RunStarted,))
    return [_run_record(event, folder.name) for event in events if isinstance(event, RunStarted)]


def _run_record(event: RunStarted, key: str) -> Record:
    about = {"experiment": event.experiment, "params": event.params, "tags": event.tags}
    return {"kind": "run", "name": event.name, "key": key, **about, "time": event.time}


def outcome_of(folder: Path) -> Iterator[Record]:
    """Yield what a run left in its folder for people: learning curve, note, answers of the final policy."""
    if (folder / CURVE).is_file():
        yield figure(folder / CURVE)
    if (folder / NOTE).is_file():
        yield note((folder / NOTE).read_text(encoding="utf-8"))
    if (folder / COMPLETIONS).is_file():
        found = json.loads((folder / COMPLETIONS).read_text(encoding="utf-8"))
        yield {"kind": "table", "name": "completions", "columns": found["columns"], "data": found["data"]}
