"""Question sets of others: the columns of a `Questions` table from the rows of a file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from stages.data.cells import Row, missing_column, required_text, text_of
from stages.data.files import ColumnsConfig, QuestionFileConfig, rows_of
from stages.identity import DataError, identify

__all__ = ["LoadedQuestions", "extract_answer", "load_questions", "without_calculator_marks"]


class LoadedQuestions(NamedTuple):
    """A set as its file has it."""

    columns: dict[str, list[Any]]
    """Of a `Questions` table."""
    rows: int
    """Rows that were read, repeated ones included."""
    repeats: int
    """Rows with the id, or the question, of an earlier one (`duplicates`)."""


def load_questions(config: QuestionFileConfig) -> LoadedQuestions:
    """The questions of a file.

    Raises:
        DataError: names the file, and the row and column where it is one's fault.
    """
    rows = list(itertools.islice(rows_of(config), config.limit))
    if not rows:
        raise DataError(f"{config.path}: no questions: the set is empty")
    columns = _resolve_columns(config, rows)
    read, repeats = _Questions(config.duplicates, "id" if columns.id else "question"), 0
    for row in rows:
        solution = text_of(row, columns.solution) if columns.solution else None
        question = " ".join(required_text(row, name) for name in _names(columns.question))
        found = {
            "question_id": required_text(row, columns.id) if columns.id else identify(question),
            "question": question,
            "answer": _answer(row, columns, solution, config.answer_marker),
            "solution": without_calculator_marks(solution) if solution and config.remove_calculator_marks else solution,
        }
        repeats += read.add(found, row.where)
    return LoadedQuestions(read.columns, len(rows), repeats)


class _Questions:
    """Columns that grow by rows, repeated ones dealt with as `duplicates` says."""

    def __init__(self, duplicates: Literal["refuse", "first", "number"], known_by: str) -> None:
        self.columns: dict[str, list[Any]] = {"question_id": [], "question": [], "answer": [], "solution": []}
        self._duplicates, self._known_by = duplicates, known_by
        self._seen: dict[str, tuple[int, str]] = {}
        """Of each id: its place in the columns, and where it stands."""
        self._counts: dict[str, int] = {}

    def add(self, row: dict[str, str | None], where: str) -> bool:
        """Add a row; whether it is a repeat.

        Raises:
            DataError: a repeat that is refused.
        """
        name = str(row["question_id"])
        count = self._counts[name] = self._counts.get(name, 0) + 1
        repeated = count > 1
        if repeated and self._duplicates == "first":
            self._require_same(row, where)
            return True
        if repeated and self._duplicates == "number":
            row = {**row, "question_id": f"{name}#{count}"}
        self._append(row, where)
        return repeated

    def _append(self, row: dict[str, str | None], where: str) -> None:
        name = str(row["question_id"])
        if name in self._seen:
            fault = f"the id {name!r}" if self._known_by == "id" else f"the question {str(row['question'])[:60]!r}"
            raise DataError(
                f"{where}: {fault} was already used at {self._seen[name][1]}; ids must be unique: set duplicates to first or "
                "number, or name another column (columns.id)"
            )
        self._seen[name] = len(self.columns["question_id"]), where
        for column, values in self.columns.items():
            values.append(row[column])

    def _require_same(self, row: dict[str, str | None], where: str) -> None:
        place, first = self._seen[str(row["question_id"])]
        for column in ("question", "answer"):
            before = self.columns[column][place]
            if row[column] != before:
                raise DataError(
                    f"{where}: repeats the {self._known_by} of {first} with another {column} ({str(row[column])[:60]!r}, there "
                    f"{before[:60]!r}), so that the first is not known to be right; mend the file, or set duplicates=number"
                )


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


def _resolve_columns(config: QuestionFileConfig, rows: Sequence[Row]) -> ColumnsConfig:
    """The columns to read: those named must be there; `solution` and `id` give way where they have their default names.

    By the name and not by who gave it: a configuration that went through a file or an override names every field.
    """
    columns = config.columns
    for name in ("solution", "id"):
        if getattr(columns, name) == ColumnsConfig.model_fields[name].default and missing_column(rows, name):
            columns = columns.model_copy(update={name: None})
    if columns.answer is None and columns.solution is None:
        present = sorted({name for row in rows for name in row.values})
        raise DataError(f"{config.path}: neither an answer nor a solution column; found columns {present}")
    for column in [*_names(columns.question), *filter(None, (columns.answer, columns.solution, columns.id))]:
        if complaint := missing_column(rows, column):
            raise DataError(f"{config.path}: {complaint}")
    return columns
