"""Question sets of others: files, Hugging Face `datasets` folders and data sets of the hub, as columns of `Questions`.

A set is known to the cache by its content (sha256 of its files), not by its path;
a hub data set by the 40 hexadecimal digits of the commit that `revision` must name.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, assert_never

from pydantic import Field

from pipeline.config import Config
from stages.data.cells import Row, missing_column, required_text, text_of
from stages.data.reading import csv_rows, datasets_rows, hub_rows, jsonl_rows, parquet_rows
from stages.tables import DataError, identify

Name = Annotated[str, Field(min_length=1)]
Format = Literal["jsonl", "csv", "tsv", "parquet", "datasets", "hub"]


class ColumnsConfig(Config):
    """Which column holds what. `solution` and `id` may be missing from the data as long as no other name is given here.

    A name is that of a column, or a path into a nested one: names of fields and numbers of list entries (from the end, if
    negative), with dots between. DAPO-Math: `prompt.0.content` and `reward_model.ground_truth`. A column that has the very
    name, dots included, wins.
    """

    question: Name | Annotated[tuple[Name, ...], Field(min_length=1)] = "question"
    """The question's text; several columns are joined by a space (SVAMP: `["body", "question"]`)."""
    answer: Name | None = "answer"
    """The gold answer; null: it is taken from the solution, behind `answer_marker`."""
    solution: Name | None = "solution"
    """A worked solution; null: none."""
    id: Name | None = "id"
    """A unique id; null or absent: made from a hash of the question. See `duplicates`."""


class QuestionFileConfig(Config):
    """A question set and how to read it."""

    path: str = Field(min_length=1)
    """A `.jsonl`, `.csv`, `.tsv` or `.parquet` file, a folder written by `datasets`' `save_to_disk`, a folder of data files, or
    (with `format: hub`) the name of a data set on the hub. No part of the cache key: the content is."""
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "datasets", "hub"] = "auto"
    """`auto` goes by the file's ending; a folder is `datasets`. `csv` (commas) and `tsv` (tabs): the first line names the
    columns."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Names of the columns."""
    split: str | None = None
    """Which split of a `datasets` folder or hub data set."""
    subset: str | None = None
    """Which configuration of a hub data set (`main` of `openai/gsm8k`)."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of a hub data set; required there, since branches move."""
    answer_marker: str = Field("####", min_length=1)
    """What precedes the answer in a solution, used when there is no answer column."""
    remove_calculator_marks: bool = False
    """Take GSM8K's `<<48/2=24>>` out of the solutions."""
    duplicates: Literal["refuse", "first", "number"] = "refuse"
    """What becomes of a row with the id of an earlier one; without an id column, with its question. `refuse`: an error.
    `first`: the earlier row stays, where question and answer are the same; a repeat that differs in them is an error.
    `number`: all stay, repeats under the ids `ID#2`, `ID#3`, ..."""
    limit: int | None = Field(None, ge=1)
    """Only the first rows of the file; repeated ones count."""

    def key(self) -> dict[str, Any]:
        """Return the fields that matter, with the content in place of the path."""
        kind = _format_of(self)
        if kind == "hub":
            _require_revision(self)
            return {**super().key(), "format": kind}
        return {**super().key(), "path": None, "format": kind, "sha256": _digest(_existing(self.path))}


def _format_of(config: QuestionFileConfig) -> Format:
    if config.format != "auto":
        return config.format
    path = _existing(config.path)
    if path.is_dir():
        return "datasets"
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return "jsonl"
        case ".csv":
            return "csv"
        case ".tsv":
            return "tsv"
        case ".parquet":
            return "parquet"
        case suffix:
            raise DataError(
                f"{path}: cannot tell the format by the ending {suffix!r}; set format to jsonl, csv or parquet"
            )


def rows_of(config: QuestionFileConfig) -> Iterator[Row]:
    """Read the rows of the set, in its order; `limit` is the caller's.

    Raises:
        DataError: names the file, and the row where it is one's fault.
    """
    kind = _format_of(config)
    match kind:
        case "jsonl":
            return jsonl_rows(_existing(config.path))
        case "csv":
            return csv_rows(_existing(config.path), ",")
        case "tsv":
            return csv_rows(_existing(config.path), "\t")
        case "parquet":
            return parquet_rows(_existing(config.path))
        case "datasets":
            return datasets_rows(_existing(config.path), config.split)
        case "hub":
            revision = _require_revision(config)
            return hub_rows(config.path, subset=config.subset, revision=revision, split=config.split)
        case _:
            assert_never(kind)


def _require_revision(config: QuestionFileConfig) -> str:
    if config.revision is None:
        raise DataError(f"{config.path}: a hub data set needs `revision`, the 40 digits of a commit: branches move")
    return config.revision


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        siblings = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (relative to {Path.cwd()}); name its folder in the config"
        raise DataError(f"{path}: no such file or folder{hint}")
    if not (found.is_file() or found.is_dir()):
        raise DataError(
            f"{path}: neither a file nor a folder but a pipe, a socket or a device; copy its content to a file"
        )
    return found


def _digest(path: Path) -> str:
    """Return sha256 of a file, or of the names and hashes of a folder's files."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    if special := next((file for file in found if file.exists() and not (file.is_file() or file.is_dir())), None):
        raise DataError(f"{special}: a pipe, a socket or a device, of which a data set cannot be made; take it out")
    files = [file for file in found if file.is_file()]
    stats = [(str(file), file.stat()) for file in files]
    parts = [_file_digest(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    if not path.is_dir():
        return parts[0]
    named = [f"{file.relative_to(path).as_posix()} {part}\n" for file, part in zip(files, parts, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()


_REMEMBERED: Final = 1024


@functools.lru_cache(maxsize=_REMEMBERED)
def _file_digest(path: str, _size: int, _changed: int) -> str:
    """Return the sha256 of a file, remembered while its size and time of change stay: every stage call asks for a key."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ questions


class LoadedQuestions(NamedTuple):
    """A set as its file has it."""

    columns: dict[str, list[Any]]
    """Of a `Questions` table."""
    rows: int
    """Rows that were read, repeated ones included."""
    repeats: int
    """Rows with the id, or the question, of an earlier one (`duplicates`)."""


def load_questions(config: QuestionFileConfig) -> LoadedQuestions:
    """Load the questions of a file.

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
        question = question_of(row, columns)
        found = {
            "question_id": required_text(row, columns.id) if columns.id else identify(question),
            "question": question,
            "answer": answer_of(row, columns, config.answer_marker),
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
        """Of each id: its place in the columns, and in the file."""
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
                    f"{before[:60]!r}), so that the first is not known to be right; correct the file, or set duplicates=number"
                )


def extract_answer(solution: str, marker: str = "####") -> str | None:
    """Return the answer a solution states behind the last `marker`, up to the end of that line; None where there is none."""
    _, found, rest = solution.rpartition(marker)
    lines = rest.strip().splitlines()
    return lines[0].strip() if found and lines else None


def question_of(row: Row, columns: ColumnsConfig) -> str:
    """Return the question's text; several columns are joined by a space."""
    return " ".join(required_text(row, name) for name in _names(columns.question))


def answer_of(row: Row, columns: ColumnsConfig, marker: str) -> str:
    """Return the gold answer: that of its column, or what the solution states behind `marker`.

    Raises:
        DataError: there is none.
    """
    if columns.answer:
        return required_text(row, columns.answer, kind="question without an answer")
    solution = text_of(row, columns.solution) if columns.solution else None
    answer = extract_answer(solution, marker) if solution else None
    if answer is None:
        raise DataError(
            f"{row.where}: question without an answer: no {marker!r} in column {columns.solution!r}; name the column of the "
            "answer, or of a solution that states it (columns)"
        )
    return answer


def without_calculator_marks(solution: str) -> str:
    """Return `48/2=<<48/2=24>>24` as `48/2=24`."""
    return re.sub(r"<<[^<>\n]*>>", "", solution)


def _names(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else columns


def _resolve_columns(config: QuestionFileConfig, rows: Sequence[Row]) -> ColumnsConfig:
    """Return the columns to read: those named must exist; `solution` and `id` may be absent under their default names.

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
