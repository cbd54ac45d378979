"""Question sets of others: the columns of a `Questions` table from the rows of a file."""

from __future__ import annotations

import difflib
import re
from typing import Any

from stages.data.files import ColumnsConfig, QuestionFileConfig, Row, required_text, rows_of, text_of
from stages.identity import DataError, identify

__all__ = ["extract_answer", "load_questions", "without_calculator_marks"]


def load_questions(config: QuestionFileConfig) -> dict[str, list[Any]]:
    """The columns of a `Questions` table.

    Raises:
        DataError: names the file, and the row and column where it is one's fault.
    """
    rows = list(rows_of(config))[: config.limit]
    if not rows:
        raise DataError(f"{config.path}: no questions: the set is empty")
    columns = _resolve_columns(config, {name for row in rows for name in row.values})
    table: dict[str, list[Any]] = {"question_id": [], "question": [], "answer": [], "solution": []}
    seen: dict[str, str] = {}
    for row in rows:
        solution = text_of(row, columns.solution) if columns.solution else None
        question = " ".join(required_text(row, name) for name in _names(columns.question))
        question_id = required_text(row, columns.id) if columns.id else identify(question)
        if question_id in seen:
            fault = f"the id {question_id!r}" if columns.id else f"the question {question[:60]!r}"
            raise DataError(f"{row.where}: {fault} was already used at {seen[question_id]}; ids must be unique")
        seen[question_id] = row.where
        table["question_id"].append(question_id)
        table["question"].append(question)
        table["answer"].append(_answer(row, columns, solution, config.answer_marker))
        table["solution"].append(
            without_calculator_marks(solution) if solution and config.remove_calculator_marks else solution
        )
    return table


def extract_answer(solution: str, marker: str = "####") -> str | None:
    """The answer a solution states behind the last `marker`, up to the end of that line; None where there is none."""
    _, found, rest = solution.rpartition(marker)
    lines = rest.strip().splitlines()
    return lines[0].strip() if found and lines else None


def _answer(row: Row, columns: ColumnsConfig, solution: str | None, marker: str) -> str:
    if columns.answer:
        return required_text(row, columns.answer, kind="question without an answer")
    answer = extract_answer(solution, marker) if solution else None
    if answer is None:
        raise DataError(f"{row.where}: question without an answer: no {marker!r} in column {columns.solution!r}")
    return answer


def without_calculator_marks(solution: str) -> str:
    """`48/2=<<48/2=24>>24` as `48/2=24`."""
    return re.sub(r"<<[^<>\n]*>>", "", solution)


def _names(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else columns


def _resolve_columns(config: QuestionFileConfig, present: set[str]) -> ColumnsConfig:
    """The columns to read: those named must be there; `solution` and `id` give way where they have their default names.

    By the name and not by who gave it: a configuration that went through a file or an override names every field.
    """
    columns = config.columns
    for name in ("solution", "id"):
        if getattr(columns, name) == ColumnsConfig.model_fields[name].default not in present:
            columns = columns.model_copy(update={name: None})
    if columns.answer is None and columns.solution is None:
        raise DataError(f"{config.path}: neither an answer nor a solution column; found columns {sorted(present)}")
    wanted = [*_names(columns.question), *filter(None, (columns.answer, columns.solution, columns.id))]
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, sorted(present), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{config.path}: no column {column!r}; found columns {sorted(present)}{hint}")
    return columns
