"""What is emitted reaches the folds of the run, in their order, complete."""

from __future__ import annotations

import pytest

from pipeline.events import (
    DriftDone,
    EvaluationDone,
    Event,
    StageDone,
    StepDone,
    Warned,
    ahead_of_its_part,
    count_calls,
    emit,
    recording,
)

KEYS = [letter * 64 for letter in "abcdef"]


def done(key: str, *, cached: bool = False) -> StageDone:
    return StageDone("score", key, "9" * 64, 0.5, cached)


def test_a_part_of_the_run_has_the_keys_of_all_calls_since_the_part_before() -> None:
    heard: list[Event] = []
    with recording(heard.append):
        for event in (
            done(KEYS[0]),
            done(KEYS[1], cached=True),
            EvaluationDone(0, "held_out", "greedy", {"evaluation": KEYS[1]}),
            DriftDone(0, {}),
            done(KEYS[2]),
            StepDone(1, 0, {"policy": KEYS[2]}),
        ):
            emit(event)
    parts = [event for event in heard if isinstance(event, EvaluationDone | DriftDone | StepDone)]
    assert [part.calls for part in parts] == [(KEYS[0], KEYS[1]), (), (KEYS[2],)]
    assert all(event.time > 0 for event in heard)


def test_an_inner_recording_adds_folds_and_shares_the_calls() -> None:
    outer: list[Event] = []
    inner: list[Event] = []
    with recording(outer.append):
        emit(done(KEYS[0]))
        with recording(inner.append):
            emit(StepDone(1, 0, {}))
        emit(StepDone(2, 0, {}))
    assert [len(outer), len(inner)] == [3, 1]
    assert [inner[0].values()["calls"], outer[2].values()["calls"]] == [(KEYS[0],), ()]


def test_calls_made_ahead_count_among_those_of_the_part_that_claims_them() -> None:
    heard: list[Event] = []
    with recording(heard.append):
        emit(done(KEYS[0]))
        with ahead_of_its_part() as keys:
            emit(done(KEYS[1]))
        emit(done(KEYS[2]))
        emit(StepDone(1, 0, {}))
        count_calls(keys)
        emit(done(KEYS[3]))
        emit(StepDone(2, 0, {}))
    assert [event.key for event in heard if isinstance(event, StageDone)] == KEYS[:4]
    assert [event.calls for event in heard if isinstance(event, StepDone)] == [(KEYS[0], KEYS[2]), (KEYS[1], KEYS[3])]


def test_an_event_before_or_after_a_run_reaches_no_fold() -> None:
    heard: list[Event] = []
    emit(Warned("before"))
    with recording(heard.append):
        emit(Warned("inside"))
    emit(Warned("after"))
    assert [event.values() for event in heard] == [{"text": "inside"}]


def test_an_error_in_a_fold_costs_a_warning_and_reaches_no_other() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError("of the display")

    with recording(broken, heard.append), pytest.warns(UserWarning, match="ZeroDivisionError: of the display"):
        emit(done(KEYS[0]))
    assert len(heard) == 1


def test_an_interrupt_in_a_fold_ends_the_work() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with recording(interrupted), pytest.raises(KeyboardInterrupt):
        emit(done(KEYS[0]))
