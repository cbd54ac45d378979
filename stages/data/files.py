"""Files of questions: JSONL, CSV and Parquet files, Hugging Face `datasets` folders, data sets of the hub, row by row.

Reading a set never runs code of the set. A set is known to the cache by its content (sha256 of its files), not by its path;
a hub data set by the 40 hexadecimal digits of the commit that `revision` must name.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, assert_never

from pydantic import Field

from pipeline.config import Config
from stages.identity import DataError

__all__ = ["ColumnsConfig", "QuestionFileConfig", "Row", "required_text", "rows_of", "text_of"]

Format = Literal["jsonl", "csv", "tsv", "parquet", "datasets", "hub"]


class ColumnsConfig(Config):
    """Which column holds what. `solution` and `id` may be missing from the data as long as no other name is given here."""

    question: str | tuple[str, ...] = "question"
    """The question's text; several columns are joined by a space (SVAMP: `["body", "question"]`)."""
    answer: str | None = "answer"
    """The gold answer; null: it is taken from the solution, behind `answer_marker`."""
    solution: str | None = "solution"
    """A worked solution; null: none."""
    id: str | None = "id"
    """A unique id; null or absent: made from a hash of the question."""


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
    """What stands before the answer in a solution, used when there is no answer column."""
    remove_calculator_marks: bool = False
    """Take GSM8K's `<<48/2=24>>` out of the solutions."""
    limit: int | None = Field(None, ge=1)
    """Only the first rows."""

    def key(self) -> dict[str, Any]:
        """The fields that matter, with the content in place of the path."""
        kind = _format_of(self)
        if kind == "hub":
            _require_revision(self)
            return {**super().key(), "format": kind}
        return {**super().key(), "path": None, "format": kind, "sha256": _digest(_existing(self.path))}


class Row(NamedTuple):
    """One row of a file, as it stands there."""

    where: str
    """`file: line 3`, for messages."""
    values: dict[str, Any]
    """By column."""


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
    """The rows of the set, in its order; `limit` is the caller's.

    Raises:
        DataError: names the file, and the row where it is one's fault.
    """
    kind = _format_of(config)
    match kind:
        case "jsonl":
            return _jsonl_rows(_existing(config.path))
        case "csv":
            return _csv_rows(_existing(config.path), ",")
        case "tsv":
            return _csv_rows(_existing(config.path), "\t")
        case "parquet":
            return _parquet_rows(_existing(config.path))
        case "datasets":
            return _datasets_rows(_existing(config.path), config.split)
        case "hub":
            return _hub_rows(config)
        case _:
            assert_never(kind)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}: line {number}: expected a JSON object, found {type(values).__name__}")
            yield Row(f"{path}: line {number}", values)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Cells are text, as they stand there; an empty one is no value. A quoted cell may hold newlines."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: line 1: a column stands there twice: {names}")
            for cells in reader:
                where = f"{path}: line {reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{where}: expected {len(names)} cells ({', '.join(names)}), found {len(cells)}; quote commas"
                    )
                yield Row(where, dict(zip(names, cells, strict=True)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: line {reader.line_num + 1} is not CSV in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    return _numbered(str(path), table.to_pylist())


def _datasets_rows(path: Path, split: str | None) -> Iterator[Row]:
    """A folder of `save_to_disk`, or a folder of data files."""
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with tempfile.TemporaryDirectory(prefix="cohort-datasets-") as scratch:
        try:
            found = datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path), cache_dir=scratch)
        except Exception as error:  # the library raises many kinds; all mean that this folder cannot be read
            raise DataError(f"{path}: `datasets` cannot read this folder: {type(error).__name__}: {error}") from None
        rows: Sequence[dict[str, Any]] = _pick_split(found, split, str(path)).to_list()
    return _numbered(f"{path}" + (f" [{split}]" if split else ""), rows)


def _hub_rows(config: QuestionFileConfig) -> Iterator[Row]:
    """A data set of the hub at one commit. `datasets` >= 4 runs no scripts of a data set at all."""
    import datasets

    _require_revision(config)
    try:
        found = datasets.load_dataset(config.path, config.subset, revision=config.revision)
    except Exception as error:  # the library raises many kinds; all mean that this set cannot be had
        raise DataError(
            f"{config.path} at {config.revision}: `datasets` cannot load it from the hub: {type(error).__name__}: {error}; "
            "where there is no connection, download it elsewhere and name its files"
        ) from None
    return _numbered(config.path, _pick_split(found, config.split, config.path).to_list())


def text_of(row: Row, column: str) -> str | None:
    """The text of one cell; numbers become their shortest text, absent and blank cells None."""
    value = row.values.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: column {column!r}: expected text or a number, found {type(value).__name__}")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.where}: column {column!r} holds half of a surrogate pair, which is not text") from None
    return text if text.strip() else None


def required_text(row: Row, column: str, *, kind: str = "no value") -> str:
    """The text of a cell that must have one.

    Raises:
        DataError: it is absent or blank; `kind` says what that means.
    """
    text = text_of(row, column)
    if text is None:
        raise DataError(f"{row.where}: {kind}: column {column!r} is empty")
    return text


def _pick_split(found: Any, split: str | None, source: str) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise DataError(f"{source}: split {split!r} asked for, but the set has no splits")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise DataError(f"{source}: expected split to be one of {sorted(found)}, found {split!r}")
    return found[split]


def _numbered(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(f"{source}: row {number}", values) for number, values in enumerate(rows))


def _require_revision(config: QuestionFileConfig) -> None:
    if config.revision is None:
        raise DataError(f"{config.path}: a hub data set needs `revision`, the 40 digits of a commit: branches move")


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        siblings = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (relative to {Path.cwd()}); name its folder in the config"
        raise DataError(f"{path}: no such file or folder{hint}")
    return found


def _digest(path: Path) -> str:
    """sha256 of a file, or of the names and hashes of a folder's files."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    parts = [_file_digest(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    if not path.is_dir():
        return parts[0]
    named = [f"{file.relative_to(path).as_posix()} {part}\n" for file, part in zip(files, parts, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()


_REMEMBERED: Final = 1024


@functools.lru_cache(maxsize=_REMEMBERED)
def _file_digest(path: str, _size: int, _changed: int) -> str:
    """sha256 of a file, remembered while its size and time of change stay: a key is asked for at every stage call."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
