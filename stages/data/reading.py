"""The rows of files by format: JSONL, CSV and TSV, Parquet, folders and hub data sets of Hugging Face `datasets`.

Reading never runs code of a data set. What cannot be had exactly is an error where it is read: columns that are not used may
hold anything.
"""

from __future__ import annotations

import csv
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stages.data.cells import Row, Unreadable, decimal_of, json_constant, json_decimal, json_integer
from stages.tables import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Read one JSON object a line; blank lines do not count. Numbers are exact, whatever their size."""
    decode = json.JSONDecoder(
        parse_float=json_decimal,
        parse_int=json_integer,
        parse_constant=json_constant,
        object_pairs_hook=_object,
    ).decode
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from None
            except _RepeatedNameError as error:
                raise DataError(f"{path}: line {number}: the name {str(error)!r} is there twice") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}: line {number}: expected a JSON object, found {type(values).__name__}")
            yield Row(f"{path}: line {number}", values)


class _RepeatedNameError(Exception):
    """A name that an object has twice, of whose values a parser would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(next(name for name in names if names.count(name) > 1))
    return values


_NOT_A_NUMBER: Final = {"nan", "inf", "infinity"}


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Read cells as text of any size; an empty one is no value. A quoted cell may hold newlines.

    A cell that is the name of no number (`nan`, `-inf`, as other programs write a missing one) cannot be read. Messages name
    the line that a row begins on.
    """
    # A cell is no longer than its file. The limit is the process's: it is raised, and never lowered under another reader.
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size + 1))
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        begins = 1
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: line 1: a column is there twice: {names}")
            begins = reader.line_num + 1
            for cells in reader:
                where = f"{path}: line {begins}"
                begins = reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{where}: expected {len(names)} cells ({', '.join(names)}), found {len(cells)}; quote commas"
                    )
                yield Row(where, dict(zip(names, map(_csv_value, cells), strict=True)))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: line {_undecodable_line(path)} is not CSV in UTF-8: {error}") from None
        except csv.Error as error:
            raise DataError(f"{path}: line {begins} is not CSV in UTF-8: {error}") from None


def _csv_value(text: str) -> str | Unreadable:
    if len(text) <= len("-infinity") and text.strip().lstrip("+-").lower() in _NOT_A_NUMBER:
        return Unreadable(
            f"expected text or a finite number, found {text!r}; take the row out, or give the text in a JSONL file"
        )
    return text


def _undecodable_line(path: Path) -> int:
    """Find the line: the decoder reads ahead in blocks and does not say."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


_PARQUET_ROWS: Final = 1024
"""Rows read at once: they may have 2 MiB of text each."""


def parquet_rows(path: Path) -> Iterator[Row]:
    """Read a Parquet file, or a folder of them; nested columns as dictionaries and lists.

    A file is read in batches: Arrow reads no nested column with 2 GiB of text in one piece.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    try:
        batches = [pq.read_table(path)] if path.is_dir() else pq.ParquetFile(path).iter_batches(_PARQUET_ROWS)
        for batch in batches:
            yield from _table_rows(batch, str(path), start=rows)
            rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def datasets_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Read a folder of `save_to_disk`, or a folder of data files."""
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with tempfile.TemporaryDirectory(prefix="cohort-datasets-") as scratch:
        try:
            found = datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path), cache_dir=scratch)
        except Exception as error:  # the library raises many kinds; all mean that this folder cannot be read
            raise DataError(f"{path}: `datasets` cannot read this folder: {type(error).__name__}: {error}") from None
        rows = list(_dataset_rows(_pick_split(found, split, str(path)), f"{path}" + (f" [{split}]" if split else "")))
    return iter(rows)


def hub_rows(path: str, *, subset: str | None, revision: str, split: str | None) -> Iterator[Row]:
    """Read a data set of the hub at one commit. `datasets` >= 4 runs no scripts of a data set at all."""
    import datasets

    try:
        found = datasets.load_dataset(path, subset, revision=revision)
    except Exception as error:  # the library raises many kinds; all mean that this set cannot be had
        raise DataError(
            f"{path} at {revision}: `datasets` cannot load it from the hub: {type(error).__name__}: {error}; "
            "where there is no connection, download it elsewhere and name its files"
        ) from None
    return _dataset_rows(_pick_split(found, split, path), path)


def _dataset_rows(found: Any, source: str) -> Iterator[Row]:
    return _table_rows(found.with_format("arrow")[:], source)  # with Python's format, float32 would become float64


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


# ------------------------------------------------------------------------------------------------ Arrow


def _table_rows(table: pa.Table | pa.RecordBatch, source: str, start: int = 0) -> Iterator[Row]:
    names = table.schema.names
    if len(set(names)) < len(names):
        raise DataError(f"{source}: a column is there twice: {names}")
    columns = [_values_of(column) for column in table.columns]
    return (
        Row(f"{source}: row {number}", dict(zip(names, cells, strict=True)))
        for number, cells in enumerate(zip(*columns, strict=True), start=start)
    )


def _values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return a column as Python's values, exact numbers among them; those that Python cannot hold are `Unreadable`."""
    import pyarrow as pa

    exact = _exact_of(column.type)
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError, TypeError, pa.ArrowException):
        values = [_value_of(scalar) for scalar in column]
    return [exact(value) for value in values] if exact else values


def _value_of(scalar: pa.Scalar) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        return Unreadable(f"a value of type {scalar.type} that cannot be read: {error}")


def _exact_of(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return what makes the values of an Arrow type exact; None: they are."""
    import pyarrow.types as types

    if types.is_floating(kind):
        return functools.partial(_exact_float, bits=_SIGNIFICANDS[kind.bit_width])
    if types.is_struct(kind):
        inner = {field.name: exact for field in kind if (exact := _exact_of(field.type))}
        return functools.partial(_exact_struct, inner=inner) if inner else None
    if types.is_map(kind):
        return functools.partial(_exact_map, item=_exact_of(kind.item_type))
    if types.is_dictionary(kind):
        return _exact_of(kind.value_type)
    if hasattr(kind, "value_type"):
        item = _exact_of(kind.value_type)
        return functools.partial(_exact_list, item=item) if item else None
    return None


_SIGNIFICANDS: Final = {16: 11, 32: 24, 64: 53}
"""Bits of the significand by those of the type."""


def _exact_float(value: Any, *, bits: int) -> Any:
    import numpy as np

    if value is None or isinstance(value, Unreadable):
        return value
    own = {11: np.float16, 24: np.float32, 53: np.float64}[bits]
    return decimal_of(str(own(value)), bits=bits)  # `str` of a NumPy number is the shortest that reads back


def _exact_struct(value: Any, *, inner: dict[str, Callable[[Any], Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: inner[name](part) if name in inner else part for name, part in value.items()}


def _exact_map(value: Any, *, item: Callable[[Any], Any] | None) -> Any:
    if not isinstance(value, Sequence):
        return value
    return {str(name): item(part) if item else part for name, part in value}


def _exact_list(value: Any, *, item: Callable[[Any], Any]) -> Any:
    return [item(part) for part in value] if isinstance(value, list) else value
