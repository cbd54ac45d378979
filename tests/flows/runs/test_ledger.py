"""Folds of a log: which calls a run came to, and what of other attempts no longer counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.runs.ledger import Ledger, read_ledger
from flows.runs.record import read_artifacts, read_record
from pipeline.event_log import EventLog
from pipeline.events import (
    DriftDone,
    EvaluationDone,
    Event,
    RunEnded,
    StageDone,
    StageStarted,
    StepDone,
)
from tests.flows.logs import START

A, B, C, D, E = (letter * 64 for letter in "abcde")


def done(stage: str, key: str, *, cached: bool = False) -> StageDone:
    """A call whose result has the digits of its key in reverse order, so that one cannot be taken for the other."""
    return StageDone(stage, key, key[1:] + "0", 2.0, cached)


def made(key: str) -> str:
    return key[1:] + "0"


def log_of(folder: Path, *events: Event) -> None:
    folder.mkdir(exist_ok=True)
    log = EventLog(folder)
    for event in events:
        log.append(event)


FIRST: tuple[Event, ...] = (
    START,
    done("rollout", A),
    done("evaluate", B, cached=True),
    EvaluationDone(0, "in", "greedy", {}, (A, B)),
    StageStarted("rollout", C),
    done("rollout", C),
    done("rollout", D),
    done("rollout", A, cached=True),
    StepDone(1, 0, {}, (C, D, A)),
    done("measure", E),
    DriftDone(1, {}, (E,)),
)


def test_a_ledger_keeps_what_belongs_to_each_step_and_evaluation(tmp_path: Path) -> None:
    live = Ledger()
    for event in FIRST:
        live.take(event)
    log_of(tmp_path / "run", *FIRST, RunEnded("finished", 1.0))
    found = read_ledger(tmp_path / "run")
    assert found is not None
    assert found.calls == live.calls
    assert [(key, call.stage, call.digest, call.seconds) for key, call in found.calls.items()] == [
        (A, "rollout", made(A), 2.0),
        (B, "evaluate", made(B), 2.0),
        (C, "rollout", made(C), 2.0),
        (D, "rollout", made(D), 2.0),
        (E, "measure", made(E), 2.0),
    ]
    assert found.evaluations[0].artifacts == {"rollout": made(A), "evaluate": made(B)}
    assert found.steps == {1: {"rollout": made(A)}}


def test_a_run_that_did_not_end_well_has_a_ledger_on_request_only(tmp_path: Path) -> None:
    log_of(tmp_path / "run", *FIRST)
    assert read_ledger(tmp_path / "run") is None
    found = read_ledger(tmp_path / "run", complete=False)
    assert found is not None
    assert found.steps.keys() == {1}
    assert read_ledger(tmp_path / "none", complete=False) is None


def test_a_repetition_that_finds_everything_adds_its_start_and_its_end(tmp_path: Path) -> None:
    log_of(tmp_path / "run", *FIRST, RunEnded("finished", 1.0, executed=4, cached=2))
    size = len((tmp_path / "run" / "events.jsonl").read_text().splitlines())
    again = [done(event.stage, event.key, cached=True) if isinstance(event, StageDone) else event for event in FIRST]
    log_of(
        tmp_path / "run",
        *(event for event in again if not isinstance(event, StageStarted)),
        RunEnded("finished", 0.5, 0, 6),
    )
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == size + 2
    found, record = read_ledger(tmp_path / "run"), read_record(tmp_path / "run")
    assert found is not None
    assert record is not None
    assert (found.steps, len(found.evaluations)) == ({1: {"rollout": made(A)}}, 1)
    assert [(attempt.executed, attempt.cached, attempt.seconds) for attempt in record.attempts] == [
        (4, 2, 1.0),
        (0, 6, 0.5),
    ]


def test_calls_of_a_step_that_was_replaced_are_no_longer_in_the_ledger(tmp_path: Path) -> None:
    log_of(tmp_path / "run", START, done("update", A), StepDone(1, 0, {}, (A,)), RunEnded("failed", 1.0, error="no"))
    log_of(tmp_path / "run", START, done("update", B), StepDone(1, 0, {}, (B,)), RunEnded("finished", 1.0))
    found = read_ledger(tmp_path / "run")
    assert found is not None
    assert (found.steps, list(found.calls)) == ({1: {"update": made(B)}}, [B])
    assert read_artifacts(tmp_path / "run") == {made(A): "update", made(B): "update"}, "both are this run's"


def test_a_record_is_that_of_all_attempts(tmp_path: Path) -> None:
    final = {"held_out": {"accuracy": 0.75}}
    best = {"held_out": (1, 0.75)}
    log_of(tmp_path / "run", START, StepDone(3, 0, {}), RunEnded("interrupted", 2.0, 5, 1, "KeyboardInterrupt: SIGINT"))
    log_of(tmp_path / "run", START, RunEnded("finished", 4.0, 1, 5, policy=C, best=best, final=final))
    log_of(tmp_path / "run", START)
    record = read_record(tmp_path / "run")
    assert record is not None
    assert (record.name, record.total_steps, record.steps, record.policy) == ("made up", 4, 3, C)
    assert record.accuracy == {"before": {}, "best": best, "final": final}
    assert [(attempt.status, attempt.error) for attempt in record.attempts] == [
        ("interrupted", "KeyboardInterrupt: SIGINT"),
        ("finished", ""),
        ("running", ""),
    ]
    assert record.finished


@pytest.mark.parametrize("attempts", [1, 5])
def test_a_record_is_read_from_few_of_the_lines_of_a_log(
    tmp_path: Path, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: starts, steps and ends are parsed, and of the calls of a step none."""
    calls = [done("score", f"{number:064x}") for number in range(90)]
    events = [event for call in calls for event in (StageStarted(call.stage, call.key), call)]
    for _ in range(attempts):
        log_of(tmp_path / "run", START, *events, StepDone(1, 0, {}), RunEnded("finished", 1.0))
    parsed = []
    from pipeline import event_log

    plain = event_log._parsed
    monkeypatch.setattr(event_log, "_parsed", lambda *given: parsed.append(1) or plain(*given))
    assert read_record(tmp_path / "run") is not None
    assert len(parsed) == 2 * attempts + 1  # the step of a repetition is not written again
