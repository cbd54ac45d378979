"""A journal that is damaged costs points in a picture, never training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.tracking.journal import Journal, Sent, read_records

RECORDS = [
    {"kind": "run", "experiment": "study", "name": "r", "key": "k", "params": {"lr": "1e-06"}, "tags": {"a": "b"}},
    {"kind": "start", "pid": 7, "time": 1.5},
    {"kind": "step", "step": 1, "time": 1.5, "metrics": {"reward/mean": 0.5}},
    {"kind": "tags", "name": "a", "tags": {"a": "c"}},
    {"kind": "dataset", "name": "gsm8k", "digest": "ab", "context": "training", "rows": 3},
    {"kind": "model", "name": "policy/ab", "model": "policy", "digest": "ab", "step": 1, "tags": {"step": "1"}},
    {"kind": "table", "name": "completions", "columns": ["a"], "data": [[1]], "time": 2},
    {"kind": "end", "status": "FINISHED", "time": 2.5},
]


def content() -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


@pytest.mark.claim("one flipped bit in a record")
def test_no_flipped_bit_anywhere_stops_a_run(tmp_path: Path) -> None:
    path, whole = tmp_path / "journal.jsonl", content()
    said = 0
    for place in range(0, 8 * len(whole), 11):  # every bit of a byte has its turn
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            journal = Journal(path)
            journal.append({"kind": "step", "step": 100, "time": 3.0, "metrics": {"reward/mean": 1.0}})
            journal.close()
        assert read_records(path, 0)[0][-1]["step"] == 100
        said += bool(caught)
        assert all(str(path) in str(warning.message) for warning in caught)
        assert len(caught) <= 1
    assert said > 4 * len(whole) / 11  # the others changed a name or a digit, which nobody can tell


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b'"step"',
        b"\xff",
        b"[" * 100_000,
        b'{"kind": "stop"}',
        b'{"kind": ["step"]}',
        b'{"kind": "step", "step": "1", "time": 1, "metrics": {}}',
        b'{"kind": "step", "step": 1, "time": 1, "metrics": {"a": "1"}}',
        b'{"kind": "step", "step": 1, "time": 1, "metrics": {"a": NaN}}',
        b'{"kind": "step", "step": 1, "time": 1, "metrics": {"a": 1e999}}',
        b'{"kind": "run", "experiment": "e", "name": "r", "key": "k", "params": {"lr": 1}, "tags": {}}',
        b'{"kind": "alias", "name": "a", "alias": "a", "run": "k", "run_name": "r", "model": {}, "began": "now"}',
        b'{"kind": "end", "time": 1}',
        b'{"kind": "end", "status": "FINISHED", "time": "now"}',
    ],
)
def test_a_line_that_is_no_record_is_left_out_and_named_and_the_others_are_kept(tmp_path: Path, line: bytes) -> None:
    path, lines = tmp_path / "journal.jsonl", content().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:], b""]))
    assert read_records(path, 0)[0] == RECORDS
    with pytest.warns(UserWarning, match=r"journal\.jsonl: line 4 cannot be read") as caught:
        Journal(path).close()
    assert len(caught) == 1


def test_a_run_whose_journal_lost_its_first_line_is_tracked_on(tmp_path: Path) -> None:
    about = {"experiment": "study", "run_name": "r", "run_key": "k", "config": {"lr": 1e-6}}
    with tracking.track(tmp_path, **about) as tracker:
        tracker.log_step(1, {"reward/mean": 0.5})
    path = tmp_path / "tracking" / "study" / "k.jsonl"
    path.write_bytes(b"x" + path.read_bytes())
    with pytest.warns(UserWarning, match="line 1 cannot be read"), tracking.track(tmp_path, **about) as tracker:
        tracker.log_step(2, {"reward/mean": 0.6})
    kinds = [record["kind"] for record in read_records(path, 0)[0]]
    assert kinds.count("run") == 1
    assert kinds.count("step") == 2


@pytest.mark.parametrize("damage", [{"offset": "7"}, {"tried": None}, {"database": 1.5}, {"error": []}, {"more": 1}])
def test_a_note_of_what_was_sent_of_wrong_types_is_none(tmp_path: Path, damage: dict[str, object]) -> None:
    journal = tmp_path / "k.jsonl"
    Sent("sqlite:///x", 3, "run", 7, "RUNNING", "", 1.0).write(journal)
    assert Sent.read(journal).offset == 7
    file = journal.with_suffix(".sent.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    assert Sent.read(journal) == Sent()
