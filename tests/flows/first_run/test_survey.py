"""What `cohort init` finds in a file of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.first_run.survey import survey
from pipeline.config import ConfigError
from stages.data import DataError
from stages.data.files import load_questions

SENTENCE = "It depends on what the reader means by it."


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "How many?", "answer": 7}, "How many?", "7"),
        ({"problem": "How many?", "final_answer": "7", "id": "a"}, "How many?", "7"),
        ({"body": "Two sit.", "question": "How many?", "answer": "2"}, "Two sit. How many?", "2"),
        ({"question": "How many?", "answer": "One and one.\n#### 2"}, "How many?", "2"),
        (
            {"prompt": [{"role": "user", "content": "Solve"}], "reward_model": {"ground_truth": "3"}},
            "Solve",
            "3",
        ),
    ],
    ids=["usual", "problem", "body", "worked", "chat"],
)
def test_columns_of_usual_names_are_found(tmp_path: Path, row: dict[str, Any], question: str, answer: str) -> None:
    found = survey(written(tmp_path, row))
    columns = load_questions(found.file).columns
    assert (columns["question"], columns["answer"]) == ([question], [answer])
    assert found.questions == (question,)


def test_a_column_of_another_name_is_named_by_an_option(tmp_path: Path) -> None:
    path = written(tmp_path, {"frage": "Wie viele?", "antwort": "7"})
    with pytest.raises(ConfigError, match=r"--question: \['antwort', 'frage'\]"):
        survey(path)
    with pytest.raises(ConfigError, match="--answer"):
        survey(path, question="frage")
    assert survey(path, question="frage", answer="antwort").questions == ("Wie viele?",)


def test_kinds_scripts_and_solutions_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "How many are there?", "answer": "1,000", "solution": "Count."},
        {"question": "一共有多少个苹果？", "answer": "(B)", "solution": None},
        {"question": "Which city is it?", "answer": "Paris", "solution": None},
    ]
    found = survey(written(tmp_path, *rows))
    assert found.kinds == {"number": 1, "option": 1, "name": 1}
    assert (found.scripts, found.solutions) == ({"LATIN": 2, "CJK": 1}, 1)
    assert found.exact
    assert not survey(written(tmp_path, *rows, {"question": "And why?", "answer": SENTENCE})).exact


@pytest.mark.parametrize(
    ("again", "kept", "questions"), [("7", "first", 1), ("8", "number", 2)], ids=["the same answer", "another answer"]
)
def test_repeated_questions_decide_how_repeats_are_read(tmp_path: Path, again: str, kept: str, questions: int) -> None:
    rows = [{"question": "How many?", "answer": answer} for answer in ("7", again)]
    found = survey(written(tmp_path, *rows))
    assert (found.file.duplicates, found.repeats, len(found.questions)) == (kept, 1, questions)


def test_a_row_without_an_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        survey(written(tmp_path, {"question": "How many?", "answer": "7"}, {"question": "And now?", "answer": ""}))
    with pytest.raises(ConfigError, match="empty"):
        survey(written(tmp_path))
