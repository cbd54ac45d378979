"""The log of a run: whatever a crash, another process, a full disk or a stranger left in it, the rest can be read."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.event_log import LOG, EventLog, parse_events, read_events
from pipeline.events import (
    DriftDone,
    EvaluationDone,
    Event,
    Freed,
    Logged,
    PreflightDone,
    RunEnded,
    RunStarted,
    StageDone,
    StageFailed,
    StageStarted,
    StepDone,
    Warned,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64

STARTED = RunStarted(
    "grpo",
    "study",
    6,
    2,
    "cohort run",
    "inline",
    "host",
    7,
    "123",
    "demo",
    [{"setting": "seed", "value": 1}],
    {"seed": "1"},
)
ONE_OF_EACH: list[Event] = [
    STARTED,
    StageStarted("score", A),
    StageDone("score", A, B, 0.25, False),
    StageFailed("score", A, "ValueError: naïve \u2028 text"),
    PreflightDone(0, "none truncated", {"reward/status_truncated": 0.0, "reward/frac_degenerate_groups": 1.0}),
    EvaluationDone(0, "held_out", "greedy", {"evaluation": A}, (A, B)),
    DriftDone(0, {"old_model_old_policy": A}),
    StepDone(1, 0, {"outputs": A, "policy": B}, (A, B)),
    Warned("careful"),
    Freed(A, True, 4096),
    RunEnded("finished", 9.5, 3, 1, "", C, {"held_out": {"accuracy": 0.1}}, {"held_out": (1, None)}, {"held_out": {}}),
    Logged("table", "runs", {"columns": ["arm"], "data": [["usual"]]}),
]


def written(folder: Path, events: list[Event] = ONE_OF_EACH) -> EventLog:
    log = EventLog(folder)
    for event in events:
        log.append(event)
    return log


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def test_every_event_is_read_as_it_was_written(tmp_path: Path) -> None:
    log = written(tmp_path)
    found = read_events(tmp_path / LOG)
    assert [event.values() for event in found] == [event.values() for event in ONE_OF_EACH]
    assert [event.number for event in found] == list(range(1, len(ONE_OF_EACH) + 1))
    assert {event.attempt for event in found} == {log.attempt}
    assert parse_events(tmp_path / LOG) == found
    first = json.loads(lines_of(tmp_path)[0])
    assert (first["type"], first["number"]) == ("RunStarted", 1)


def test_reading_goes_on_after_a_number_and_by_type(tmp_path: Path) -> None:
    written(tmp_path)
    assert [type(event) for event in read_events(tmp_path / LOG, after=9)] == [Freed, RunEnded, Logged]
    assert [event.number for event in read_events(tmp_path / LOG, kinds=[StepDone, RunStarted])] == [1, 8]


def test_a_log_that_is_torn_at_any_byte_is_read_and_continued(tmp_path: Path) -> None:
    written(tmp_path, ONE_OF_EACH[:4])
    lines, file = lines_of(tmp_path), tmp_path / LOG
    before = b"".join(lines[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in range(len(lines[3])):
            file.write_bytes(before + lines[3][:length])
            assert len(read_events(file)) == 3
            assert written(tmp_path, [Warned("next")]).append(Warned("later")) == 5
            assert [event.number for event in parse_events(file)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "damage", [b"", b"\x00\xff", b"{}", b'{"type":"StepDone","number":', b'{"type":"Nothing","number":2}']
)
def test_a_damaged_line_is_skipped_and_named(tmp_path: Path, damage: bytes) -> None:
    written(tmp_path, ONE_OF_EACH[:3])
    lines = lines_of(tmp_path)
    (tmp_path / LOG).write_bytes(lines[0] + damage + b"\n" + lines[2])
    with pytest.warns(UserWarning, match="line 2 cannot be read"):
        assert [event.number for event in read_events(tmp_path / LOG)] == [1, 3]
    with pytest.raises(ValueError, match="line 2"):
        parse_events(tmp_path / LOG)
    assert EventLog(tmp_path).append(Warned("next")) == 4


@pytest.mark.claim("one flipped bit in a record")
def test_no_flipped_bit_anywhere_stops_a_run(tmp_path: Path) -> None:
    written(tmp_path)
    file, whole = tmp_path / LOG, (tmp_path / LOG).read_bytes()
    named = 0
    places = range(0, 8 * len(whole), 19)  # every bit of a byte has its turn
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        EventLog(tmp_path).append(Warned("next"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert read_events(file)[-1].values() == {"text": "next"}
        assert len(caught) <= 1
        named += bool(caught)
    assert named > len(places) / 3  # the others changed a name or a digit, which none can tell


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (2, {"result": "../../etc/passwd"}),
        (2, {"key": A.upper()}),
        (2, {"stage": "score\x1b[2J"}),
        (2, {"stage": "s" * 301}),
        (2, {"seconds": float("nan")}),
        (2, {"seconds": float("inf")}),
        (2, {"seconds": -1.0}),
        (2, {"seconds": 1e300}),
        (2, {"cached": 1}),
        (2, {"number": 0}),
        (2, {"number": "3"}),
        (2, {"number": 2**80}),
        (2, {"number": True}),
        (2, {"time": -1.0}),
        (2, {"time": None}),
        (2, {"attempt": "../12345"}),
        (2, {"attempt": "1234567"}),
        (2, {"more": 1}),
        (0, {"pid": 0}),
        (0, {"pid": 2**31}),
        (0, {"total_steps": -1}),
        (0, {"overrides": [1]}),
        (0, {"params": {"seed": 1}}),
        (0, {"name": "\ud800"}),
        (4, {"metrics": {"reward/mean": float("nan")}}),
        (4, {"text": "x" * 4001}),
        (7, {"step": -1}),
        (7, {"step": 1.5}),
        (7, {"made": {"outputs": "b"}}),
        (7, {"calls": [1]}),
        (10, {"status": "running"}),
        (10, {"policy": "newest"}),
        (10, {"best": {"held_out": [1]}}),
        (10, {"final": {"held_out": {"accuracy": "high"}}}),
    ],
)
def test_a_value_that_no_run_writes_is_refused(tmp_path: Path, index: int, change: dict[str, Any]) -> None:
    written(tmp_path)
    lines = lines_of(tmp_path)
    lines[index] = json.dumps(json.loads(lines[index]) | change, separators=(",", ":")).encode() + b"\n"
    (tmp_path / LOG).write_bytes(b"".join(lines))
    with pytest.raises(
        ValueError,
        match=f"line {index + 1}: {next(iter(change))}|line {index + 1}: Invalid JSON|line {index + 1}: record",
    ):
        parse_events(tmp_path / LOG)
    with pytest.warns(UserWarning, match=f"line {index + 1} "):
        assert len(read_events(tmp_path / LOG)) == len(lines) - 1


@pytest.mark.parametrize("missing", ["number", "time", "attempt", "key", "result"])
def test_an_event_without_one_of_its_fields_is_refused(tmp_path: Path, missing: str) -> None:
    written(tmp_path, ONE_OF_EACH[2:3])
    values = json.loads(lines_of(tmp_path)[0])
    del values[missing]
    (tmp_path / LOG).write_bytes(json.dumps(values, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(ValueError, match="line 1"):
        parse_events(tmp_path / LOG)


def test_nesting_and_numbers_that_do_not_ascend_are_refused(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b'{"type":"Warned","text":' + b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match="line 1"):
        parse_events(tmp_path / LOG)
    (tmp_path / LOG).unlink()
    written(tmp_path, ONE_OF_EACH[:2])
    first, second = lines_of(tmp_path)
    (tmp_path / LOG).write_bytes(second + first)
    with pytest.raises(ValueError, match="line 2: number"):
        parse_events(tmp_path / LOG)


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        log.append(PreflightDone(0, "", {"reward/mean": float("nan")}))
    assert log.append(STARTED) == 1


def test_what_the_log_has_is_not_written_again(tmp_path: Path) -> None:
    part = [StageDone("score", A, B, 0.25, False), StepDone(1, 0, {"policy": A}, (A,))]
    written(tmp_path, [STARTED, *part])
    found_again = [dataclasses.replace(part[0], cached=True), part[1]]
    again = written(tmp_path, [STARTED, *found_again, RunEnded("finished", 1.0, 0, 1)])
    assert [type(event) for event in read_events(tmp_path / LOG)] == [
        RunStarted, StageDone, StepDone, RunStarted, RunEnded,
    ]  # fmt: skip
    assert again.append(found_again[1]) == 3
    assert again.append(part[0]) == 6  # computed once more: its payload had been pruned


def test_a_step_that_comes_to_other_calls_is_written_each_time(tmp_path: Path) -> None:
    here, there = (StepDone(1, 0, {"policy": key}, (key,)) for key in (A, B))
    log = written(tmp_path, [here, there, here, here])
    assert [event.values()["made"] for event in read_events(tmp_path / LOG)] == [
        {"policy": A},
        {"policy": B},
        {"policy": A},
    ]
    assert log.append(EvaluationDone(1, "held_out", "greedy", {})) == 4
    assert log.append(EvaluationDone(1, "held_out", "sampled", {})) == 5


def test_two_attempts_at_once_are_told_apart_and_numbered_through(tmp_path: Path) -> None:
    first, second = EventLog(tmp_path), EventLog(tmp_path)
    for number in range(1, 21):
        log = first if number % 3 else second
        assert log.append(Warned(f"text {number}")) == number
    found = parse_events(tmp_path / LOG)
    assert [event.attempt == second.attempt for event in found] == [number % 3 == 0 for number in range(1, 21)]


def _append_many(folder: Path, count: int) -> None:
    log = EventLog(folder)
    for number in range(count):
        log.append(StageStarted(f"stage-{number}", A))


def test_processes_that_write_at_the_same_time_lose_no_event(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, 200)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = parse_events(tmp_path / LOG)
    assert [event.number for event in found] == list(range(1, 601))
    for attempt in {event.attempt for event in found}:
        assert [event.values()["stage"] for event in found if event.attempt == attempt] == [
            f"stage-{number}" for number in range(200)
        ]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_a_disk_that_is_full_costs_one_warning_and_no_event(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.take(STARTED)
    size = (tmp_path / LOG).stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as said:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))  # a write ends in the middle of a line
            log.take(Warned("first"))
            log.take(Warned("second"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ["the log of this run is not up to date" in str(warning.message) for warning in said] == [True]
    assert (tmp_path / LOG).stat().st_size == size
    log.take(Warned("third"))
    assert [event.values().get("text") for event in parse_events(tmp_path / LOG)] == [None, "first", "second", "third"]


def test_a_folder_that_is_gone_costs_one_warning(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "gone")
    with warnings.catch_warnings(record=True) as said:
        log.take(STARTED)
        log.take(Warned("text"))
    assert len(said) == 1


def test_a_log_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    log = written(tmp_path, ONE_OF_EACH[:5])
    (tmp_path / LOG).unlink()
    assert log.append(ONE_OF_EACH[2]) == 1


def test_passwords_and_bytes_that_are_no_text_are_not_written(tmp_path: Path) -> None:
    command = b"cohort run \xff".decode("utf-8", "surrogateescape")
    written(tmp_path, [dataclasses.replace(STARTED, command=command), Warned("postgresql://me:secret@host/db is away")])
    started, warned = parse_events(tmp_path / LOG)
    assert started.values()["command"] == "cohort run ?"
    assert warned.values()["text"] == "postgresql://me:***@host/db is away"
