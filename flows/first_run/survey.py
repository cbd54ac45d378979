"""Look at a file of questions: which columns hold what, how long, in which script, what kinds of answers, what is repeated."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flows.algorithm.data_check import answer_kinds
from pipeline.config import ConfigError
from stages.data import ColumnsConfig, DataError, QuestionFileConfig
from stages.data.cells import Row, has_cell
from stages.data.files import load_questions, rows_of
from stages.reward.rules.format import main_script

_QUESTIONS: Final = ("question", "problem", "prompt", "query", "instruction", "input", "text")
_ANSWERS: Final = (
    "answer",
    "final_answer",
    "gold",
    "target",
    "label",
    "ground_truth",
    "reward_model.ground_truth",
    "output",
)
_SOLUTIONS: Final = ("solution", "rationale", "reasoning", "explanation")
_IDS: Final = ("id", "question_id", "unique_id")
_MARKER: Final = "####"
_LOOKED_AT: Final = 200
"""Rows that decide which column holds what."""


@dataclass(frozen=True)
class Survey:
    """What is in a file of questions."""

    file: QuestionFileConfig
    """How to read it."""
    questions: tuple[str, ...]
    repeats: int
    """Rows that repeat an earlier one."""
    kinds: Counter[str]
    """Answers by kind (`flows/algorithm/data_check.py: answer_kinds`)."""
    scripts: Counter[str]
    """Questions by script."""
    solutions: int
    """Questions with a worked solution."""

    @property
    def script(self) -> str | None:
        """Return the script of most questions; None: they have no words."""
        return self.scripts.most_common(1)[0][0] if self.scripts else None

    @property
    def exact(self) -> bool:
        """Return whether numbers, options and names are all there is to compare, which needs no symbolic verifier."""
        return not self.kinds["formula"] and not self.kinds["sentence"]

    def __str__(self) -> str:
        repeated = f", {self.repeats:,} rows repeat others" if self.repeats else ""
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in self.kinds.most_common())
        scripts = ", ".join(script.lower() for script, _ in self.scripts.most_common(3)) or "no words"
        return (
            f"{len(self.questions):,} questions ({scripts}){repeated}; answers: {counts}; {self.solutions:,} solutions"
        )


def survey(path: Path, *, question: str | None = None, answer: str | None = None) -> Survey:
    """Read a file of questions.

    Args:
        question, answer: names of columns; None: found by the usual names.

    Raises:
        ConfigError: no column has a usual name; says which there are.
        DataError: as `load_questions`.
    """
    columns = _columns(path, question, answer)
    file = QuestionFileConfig(path=str(path), columns=columns, duplicates="first")
    try:
        loaded = load_questions(file)
    except DataError:
        file = file.override({"duplicates": "number"})  # a repeat with another answer; any other fault comes again
        loaded = load_questions(file)
    if not loaded.repeats:
        file = file.override({"duplicates": "refuse"})
    texts, answers, solutions = (loaded.columns[name] for name in ("question", "answer", "solution"))
    scripts = Counter(script for script in map(main_script, texts) if script is not None)
    worked = sum(solution is not None for solution in solutions)
    return Survey(file, tuple(texts), loaded.repeats, answer_kinds(answers), scripts, worked)


def _columns(path: Path, question: str | None, answer: str | None) -> ColumnsConfig:
    rows = list(itertools.islice(rows_of(QuestionFileConfig(path=str(path))), _LOOKED_AT))
    if not rows:
        raise ConfigError(f"--data {path}: no questions: the file is empty")
    asked = question or _question(rows)
    stated = answer or _first(rows, _ANSWERS)
    solution = _first(rows, _SOLUTIONS)
    if stated is not None and answer is None and solution is None and _is_worked(rows, stated):
        solution, stated = stated, None  # GSM8K as published: the answer stands behind the solution's `####`
    if asked is None or (stated is None and solution is None):
        what, option = ("question", "--question") if asked is None else ("answer", "--answer")
        names = sorted({name for row in rows for name in row.values})
        raise ConfigError(
            f"--data {path}: no column of the usual names holds the {what}; name it with {option}: {names}"
        )
    return ColumnsConfig.model_validate(
        {"question": asked, "answer": stated, "solution": solution, "id": _first(rows, _IDS)}
    )


def _first(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    return next((name for name in names if all(has_cell(row, name) for row in rows)), None)


def _question(rows: Sequence[Row]) -> str | tuple[str, ...] | None:
    """Return the column of the question; SVAMP has two, and chats a list of messages."""
    if _first(rows, ("body",)) and _first(rows, ("question",)):
        return ("body", "question")
    name = _first(rows, _QUESTIONS)
    if name is None or not all(_is_chat(row.values.get(name)) for row in rows):
        return name
    return f"{name}.0.content"


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Mapping) and "content" in value[0]


def _is_worked(rows: Sequence[Row], name: str) -> bool:
    return all(_MARKER in str(row.values.get(name, "")) for row in rows)
