"""`cohort grade`: verdicts on a file, disagreements by line, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command

EXACT = ("--set", "reward.components=[{kind: accuracy, verifier: exact}]")


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_counted_and_written_with_status_and_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(
        tmp_path,
        {"gold": "72", "output": "#### 72 eggs", "note": "kept"},
        {"gold": 72, "output": "#### 73"},
        {"gold": "72", "output": "no idea"},
    )
    out = tmp_path / "graded.jsonl"
    assert run_command(["grade", str(path), "--out", str(out), *EXACT]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["status"], row["read_as"]) for row in rows] == [("ok", "72"), ("wrong", "73"), ("unparseable", None)]
    assert rows[0]["note"] == "kept"
    printed = capsys.readouterr().out
    assert "3 rows" in printed
    assert [line.split()[:2] for line in printed.splitlines()[1:4]] == [
        ["ok", "1"],
        ["wrong", "1"],
        ["unparseable", "1"],
    ]


def test_disagreements_are_listed_by_line_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(
        tmp_path,
        {"gold": "1", "output": "#### 1", "expected": True},
        "",
        {"gold": "2", "output": "\x1b[31m[bold]#### 3", "expected": True},
        {"gold": "2", "output": "#### 4"},
    )
    assert run_command(["grade", str(path), *EXACT]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 rows are graded as expected" in printed
    assert "line 3: expected ok, found wrong" in printed
    assert "\x1b" not in printed
    assert "[bold]" in printed


def test_a_recipe_and_its_settings_decide_what_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"gold": "42", "output": "<think>#### 42\n</think>I cannot tell.", "expected": True})
    assert run_command(["grade", str(path), "--recipe", "gsm8k_cpu"]) == 0
    assert run_command(["grade", str(path), "--recipe", "gsm8k_cpu", "--set", "reward.thinking={}"]) == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"gold": "1", "output": "1"}, "{"], "line 2"),
        ([["gold"]], "line 1: expected an object"),
        ([{"gold": "1", "text": "1"}], "line 1: expected gold and output, found gold, text"),
        ([{"gold": 1.5, "output": "1"}], "line 1: expected gold to be text, found float"),
        ([{"gold": "1", "output": None}], "line 1: expected output to be text, found NoneType"),
        ([{"gold": " ", "output": "1"}], "line 1: the gold answer is empty"),
        ([{"gold": "1", "output": "1", "expected": "yes"}], "line 1: expected `expected`"),
        ([], "found none"),
    ],
)
def test_a_row_that_is_not_as_expected_is_refused_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], named: str
) -> None:
    assert run_command(["grade", str(file_of(tmp_path, *rows)), *EXACT]) == 2
    assert named in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_not_there_or_would_be_written_over_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"gold": "1", "output": "1"})
    assert run_command(["grade", str(tmp_path / "none.jsonl")]) == 2
    assert run_command(["grade", str(path), "--out", str(path)]) == 2


def test_a_reward_without_accuracy_grades_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, {"gold": "1", "output": "1"})
    assert run_command(["grade", str(path), "--set", "reward.components=[{kind: format}]"]) == 2
    assert "accuracy" in capsys.readouterr().err
