"""What differs between two tables: columns, rows by key, values.

Works on Arrow columns, not on Python rows: two tables of a hundred thousand outputs of a thousand tokens take seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import ArtifactError
from pipeline.store import Store

__all__ = ["ChangedRow", "ColumnChange", "TableDifference", "compare_tables", "read_rows", "schema_changes"]

Key = tuple[Any, ...]
Mask = npt.NDArray[numpy.bool_]
Rows = npt.NDArray[numpy.int64]


@dataclasses.dataclass(frozen=True)
class ColumnChange:
    """A column whose values differ in some rows that both tables have."""

    name: str
    rows: int
    largest: float | None
    """Largest absolute difference; None where the column holds no numbers, or none in both tables."""


@dataclasses.dataclass(frozen=True)
class ChangedRow:
    """A row that both tables have, with the columns that differ: before, after."""

    key: Key
    values: dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class TableDifference:
    """Two tables joined by key."""

    key: tuple[str, ...]
    """The columns that name a row; none: its number."""
    shared: int
    """Rows that both have."""
    only_before: list[Key]
    only_after: list[Key]
    columns: list[ColumnChange]
    """Those that both have, with one type, and that differ, in the order of the schema."""
    changed: int
    """Rows that both have and that differ in some column."""
    _before: pa.Table = dataclasses.field(repr=False)
    _after: pa.Table = dataclasses.field(repr=False)
    _masks: dict[str, Mask] = dataclasses.field(repr=False)
    _keys: list[Key] = dataclasses.field(repr=False)

    def first(self, limit: int) -> Iterator[ChangedRow]:
        """The first `limit` rows that changed."""
        anywhere = numpy.logical_or.reduce(list(self._masks.values())) if self._masks else numpy.zeros(0, bool)
        for row in numpy.flatnonzero(anywhere)[:limit].tolist():
            names = [name for name, mask in self._masks.items() if mask[row]]
            values = {name: (self._before[name][row].as_py(), self._after[name][row].as_py()) for name in names}
            yield ChangedRow(self._keys[row], values)


def read_rows(store: Store, digest: str) -> pa.Table | None:
    """The rows of any table in the store, whatever schema it was written with; None: the artifact is no table.

    Raises:
        StoreError: the payload is missing, damaged or pruned.
        ArtifactError: the file holds no table.
    """
    path = store.path(digest) / "table.arrow"
    if not path.exists():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # a sound hash only says that the bytes are those its writer meant
        return table
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path}: not a readable Arrow file: {error}") from None


def schema_changes(before: pa.Schema, after: pa.Schema) -> dict[str, tuple[str, str]]:
    """Column -> its type before and after, where they differ; `-` where there is no such column."""
    old, new = ({field.name: _type(field) for field in schema} for schema in (before, after))
    names = dict.fromkeys([*old, *new])
    return {name: (old.get(name, "-"), new.get(name, "-")) for name in names if old.get(name) != new.get(name)}


def compare_tables(before: pa.Table, after: pa.Table, *, key: Sequence[str]) -> TableDifference:
    """Join two tables by the columns `key` (rows of one key by their order; without columns by row) and compare them."""
    old, new = _places(before, key), _places(after, key)
    keys = [name for name in old if name in new]
    left = _aligned(before, [old[name] for name in keys])
    right = _aligned(after, [new[name] for name in keys])
    masks, columns = {}, []
    for field in before.schema:
        place = after.schema.get_field_index(field.name)
        if place < 0 or after.schema.field(place).type != field.type or field.name in key:
            continue
        mask, largest = _compare(left[field.name].combine_chunks(), right[field.name].combine_chunks())
        if mask.any():
            masks[field.name] = mask
            columns.append(ColumnChange(field.name, int(mask.sum()), largest))
    return TableDifference(
        key=tuple(key),
        shared=len(keys),
        only_before=[name for name in old if name not in new],
        only_after=[name for name in new if name not in old],
        columns=columns,
        changed=int(numpy.logical_or.reduce(list(masks.values())).sum()) if masks else 0,
        _before=left,
        _after=right,
        _masks=masks,
        _keys=keys,
    )


def _type(field: pa.Field) -> str:
    return f"{field.type}{'?' if field.nullable else ''}"


def _places(table: pa.Table, key: Sequence[str]) -> dict[Key, int]:
    """Row number by key; the second row of a key has a 1 behind it, and so on."""
    if not key:
        return {(row,): row for row in range(table.num_rows)}
    places: dict[Key, int] = {}
    repeated: dict[Key, int] = {}
    for row, name in enumerate(zip(*(table[column].to_pylist() for column in key), strict=True)):
        count = repeated.get(name, 0)
        repeated[name] = count + 1
        places[(*name, count) if count else name] = row
    return places


def _aligned(table: pa.Table, rows: list[int]) -> pa.Table:
    return table.combine_chunks().take(pa.array(rows, pa.int64()))


def _compare(before: pa.Array, after: pa.Array) -> tuple[Mask, float | None]:
    """Which of the values differ, and by how much at most; NaN equals NaN, null equals null."""
    if before.equals(after):
        return numpy.zeros(len(before), bool), None
    if pa.types.is_list(before.type):
        return _compare_lists(before, after)
    if pa.types.is_nested(before.type):
        pairs = zip(before.to_pylist(), after.to_pylist(), strict=True)
        return numpy.array([old != new for old, new in pairs], bool), None
    unequal = pc.fill_null(pc.not_equal(before, after), False).to_numpy(zero_copy_only=False)
    unequal |= _null(before) != _null(after)
    if pa.types.is_floating(before.type):
        unequal &= ~(_nan(before) & _nan(after))
    return unequal, _largest(before, after)


def _compare_lists(before: pa.Array, after: pa.Array) -> tuple[Mask, float | None]:
    unequal = _null(before) != _null(after)
    old, new = _lengths(before), _lengths(after)
    unequal |= old != new
    rows: Rows = numpy.flatnonzero(~unequal & (old > 0))
    inner, largest = _compare(before.take(pa.array(rows)).flatten(), after.take(pa.array(rows)).flatten())
    unequal[numpy.repeat(rows, old[rows])[inner]] = True
    return unequal, largest


def _lengths(lists: pa.Array) -> Rows:
    lengths: Rows = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(numpy.int64)
    return lengths


def _null(values: pa.Array) -> Mask:
    mask: Mask = pc.is_null(values).to_numpy(zero_copy_only=False)
    return mask


def _nan(values: pa.Array) -> Mask:
    mask: Mask = pc.fill_null(pc.is_nan(values), False).to_numpy(zero_copy_only=False)
    return mask


def _largest(before: pa.Array, after: pa.Array) -> float | None:
    if not (pa.types.is_integer(before.type) or pa.types.is_floating(before.type)):
        return None
    old, new = (values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) for values in (before, after))
    distances = numpy.abs(new - old)
    finite = distances[numpy.isfinite(distances)]  # null and NaN have no distance
    return float(finite.max()) if finite.size else None
