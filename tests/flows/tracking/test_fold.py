"""From a log to what MLflow gets: each point once, whatever attempts repeated, and the status that is true now."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from flows.runs.record import IMPORTED
from flows.tracking.fold import MlflowFold
from flows.tracking.sender import logs_of
from pipeline.event_log import EventLog
from pipeline.events import EvaluationDone, Event, RunEnded, RunStarted, StageDone, StepDone
from pipeline.store import Store
from pipeline.tracking.records import Record, Sent, point, table, tags
from tests.pipeline.calls import call

A, B, C, D = (letter * 64 for letter in "abcd")
START = RunStarted("r", "study", 2, 1, "cohort run", "inline", "elsewhere", 7, "0", params={"seed": "1"})
FINISHED = RunEnded(
    "finished", 1.0, policy=D, best={"in": (1, 0.75)}, final={"in": {"accuracy": 0.5, "pass_at_2": 0.6}}
)


@pytest.fixture
def log(tmp_path: Path, store: Store) -> EventLog:
    """The empty log of a run, in whose store steps sampled 4 outputs (A), 8 (B), and 16 (C)."""
    for key, samples in ((A, 4), (B, 8), (C, 16)):
        store.record(key, call("9" * 64, metrics={"rollout/samples": samples, "time/update": 0.5}))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    return EventLog(tmp_path / "runs" / "r")


def step(number: int, key: str) -> StepDone:
    return StepDone(number, 0, {"outputs": key}, (key,))


def folded(log: EventLog, events: list[Event], sent: int = 0) -> MlflowFold:
    for event in events:
        log.append(event)
    fold = MlflowFold(log.file.parent, sent)
    fold.read()
    return fold


def points(records: list[Record], metric: str) -> list[tuple[int, float]]:
    found = [part for part in records if part["kind"] == "step" and metric in part["metrics"]]
    return [(part["step"], part["metrics"][metric]) for part in found]


def test_what_was_sent_is_left_out_and_counted(log: EventLog) -> None:
    fold = folded(log, [START, step(1, A), step(2, B)], sent=2)
    assert [record["kind"] for record in fold.records] == ["step"]
    assert points(fold.records, "progress/samples") == [(2, 12)]
    fold.note_sent()
    log.append(FINISHED)
    fold.read()
    assert fold.sent == 3
    assert {record["kind"] for record in fold.records} == {"step", "tags", "model"}


def test_a_step_that_was_done_again_is_counted_once(log: EventLog) -> None:
    fold = folded(log, [START, step(1, A), step(2, B), START, step(1, C), step(2, B)])
    assert points(fold.records, "progress/samples") == [(1, 4), (2, 12), (1, 16)]
    log.append(step(3, A))
    fold.read()
    assert points(fold.records, "progress/samples")[-1] == (3, 16)


def test_the_outcome_is_at_the_last_step(log: EventLog) -> None:
    records = folded(log, [START, step(1, A), step(2, B), FINISHED]).records
    assert points(records, "final/in/accuracy") == [(2, 0.5)]
    assert points(records, "best/in/accuracy") == [(2, 0.75)]
    assert points(records, "final/in/pass_at_2") == []
    assert tags({"cohort.policy": D}).items() <= records[-2].items()
    assert (records[-1]["kind"], records[-1]["digest"]) == ("model", D)


KILLED, FAILED = RunEnded("interrupted", 1.0, error="KeyboardInterrupt: SIGINT"), RunEnded("failed", 1.0, error="E: x")


@pytest.mark.parametrize(
    ("events", "status", "reason"),
    [
        ([], "", None),
        ([step(1, A)], "RUNNING", None),
        ([FINISHED, START], "FINISHED", None),
        ([step(1, A), FINISHED, START, step(1, A)], "FINISHED", None),
        ([step(1, A), FINISHED, START, step(1, B)], "RUNNING", None),
        ([FINISHED, START, KILLED], "KILLED", "KeyboardInterrupt"),
        ([step(1, A), START, FAILED], "FAILED", "E: x"),
    ],
)
def test_a_run_runs_again_with_its_next_new_point(
    log: EventLog, events: list[Event], status: str, reason: str | None
) -> None:
    fold = folded(log, [START, *events])
    assert fold.status == status
    found = [part["tags"] for part in fold.records if part["kind"] == "tags"]
    assert [part["cohort.status_reason"] for part in found if "cohort.status_reason" in part] == (
        [reason] if reason else []
    )


def test_what_cannot_be_read_of_an_event_costs_that_alone(log: EventLog) -> None:
    (log.file.parent / "completions.json").write_text("[")
    lost = EvaluationDone(0, "in", "greedy", {"evaluation": D}, (D,))
    data = StageDone("arithmetic_questions", D, D, 1.0, cached=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fold = folded(log, [START, data, lost, step(1, A), FINISHED])
    assert len(caught) == 3
    assert {(record["kind"], record["name"]) for record in fold.records} >= {("run", "r"), ("step", "1")}
    assert fold.status == "FINISHED"


def test_the_files_of_a_run_are_its_picture_note_and_table(log: EventLog) -> None:
    folder, answers = log.file.parent, table("completions", [{"question": "1+1", "reward": float("nan")}])
    (folder / "learning_curve.png").write_bytes(b"png")
    (folder / "note.md").write_text("# What happened")
    (folder / "completions.json").write_text(json.dumps({name: answers[name] for name in ("columns", "data")}))
    *_, picture, note, found = folded(log, [START, FINISHED]).records
    assert (picture["kind"], picture["name"]) == ("figure", "learning_curve.png")
    assert note["tags"] == {"mlflow.note.content": "# What happened"}
    assert found.items() >= {"kind": "table", "columns": ["question", "reward"], "data": [["1+1", None]]}.items()


def test_of_equal_records_of_one_name_the_first_is_sent() -> None:
    some: list[Record] = [tags({"a": "1"}), tags({"a": "1"}), tags({"a": "2"}), tags({"b": "1"})]
    sent, hashes = Sent().unsent({**record, "time": float(place)} for place, record in enumerate(some))
    assert [part["time"] for part in sent] == [0, 2, 3]
    assert Sent(hashes=hashes).unsent([some[2], some[3]])[0] == []
    again: Any = Sent(hashes=hashes).unsent([some[0]])[0]
    assert again == [some[0]]


def test_a_run_of_an_archive_is_sent_when_it_was_asked_for_here(log: EventLog, tmp_path: Path) -> None:
    log.append(START)
    assert logs_of(tmp_path) == [log.file.parent]
    (log.file.parent / IMPORTED).write_text("{}")
    assert logs_of(tmp_path) == []


def test_what_mlflow_refuses_is_no_point() -> None:
    assert point(1, {"pass@1": 0.5, "pass_at_1": 0.5, "nan": float("nan")})["metrics"] == {"pass_at_1": 0.5}


def test_importing_tracking_imports_no_mlflow_and_no_configuration() -> None:
    heavy = ("mlflow", "prefect", "torch", "sqlalchemy", "flows.config")
    code = f"import sys, flows.tracking.delivery; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
