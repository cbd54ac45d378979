"""Differences of two tables and of two checkpoints.

Tables are compared as Arrow columns, not as Python rows: two tables of a hundred thousand outputs of a thousand tokens take
seconds. Weights are safetensors files (8 bytes of length, a JSON header of names, types, shapes and places, then the values),
memory-mapped and compared piece by piece, so that files larger than memory can be. `safe_open` has no bfloat16 without torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, TypeAdapter

from pipeline.artifact import ArtifactError
from pipeline.store import Store

Key = tuple[Any, ...]
Mask = npt.NDArray[numpy.bool_]
Rows = npt.NDArray[numpy.int64]

_PIECE: Final = 1 << 22
"""Values compared at a time."""
_TYPES: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "<u1",
}


@dataclasses.dataclass(frozen=True)
class ColumnChange:
    """A column whose values differ in some rows that both tables have."""

    name: str
    rows: int
    largest: float | None
    """Largest absolute difference; None where the column holds no numbers, or none in both tables."""


@dataclasses.dataclass(frozen=True)
class ChangedRow:
    """A row of both tables, with the columns that differ: before, after."""

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
        """Return the first `limit` rows that changed."""
        anywhere = numpy.logical_or.reduce(list(self._masks.values())) if self._masks else numpy.zeros(0, bool)
        for row in numpy.flatnonzero(anywhere)[:limit].tolist():
            names = [name for name, mask in self._masks.items() if mask[row]]
            values = {name: (self._before[name][row].as_py(), self._after[name][row].as_py()) for name in names}
            yield ChangedRow(self._keys[row], values)


def read_rows(store: Store, digest: str) -> pa.Table | None:
    """Return the rows of any table in the store, whatever its schema; None: the artifact is no table.

    Raise StoreError where the payload is missing, damaged or pruned, ArtifactError where the file holds no table.
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
    """Return column -> its type before and after, where they differ; `-` where there is no such column."""
    old, new = ({each.name: f"{each.type}{'?' if each.nullable else ''}" for each in side} for side in (before, after))
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


def _places(table: pa.Table, key: Sequence[str]) -> dict[Key, int]:
    """Return row number by key; a 1 follows the key of its second row, and so on."""
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
    """Return which values differ, and by how much at most; NaN equals NaN, null equals null."""
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


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file."""

    file: Path
    kind: str
    """Type, as the format names it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    def pieces(self) -> Iterator[npt.NDArray[numpy.float64]]:
        """Yield the values in order, some millions at a time; raise ValueError for a type that numpy lacks (8-bit floats)."""
        if self.kind not in _TYPES:
            raise ValueError(f"{self.file}: tensors of type {self.kind} cannot be compared; known: {', '.join(_TYPES)}")
        if not self.size:
            return
        values = numpy.memmap(self.file, _TYPES[self.kind], "r", self.offset, (self.size,))
        for start in range(0, self.size, _PIECE):
            piece = values[start : start + _PIECE]
            if self.kind == "BF16":
                piece = (piece.astype(numpy.uint32) << 16).view(numpy.float32)
            yield piece.astype(numpy.float64)


class _Tensor(BaseModel):
    """A tensor in the header of a file."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


_HEADER: Final = TypeAdapter(dict[str, _Tensor | dict[str, str]])  # the latter is `__metadata__`


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name and shape."""

    name: str
    shape: tuple[int, ...]
    largest: float
    """Largest absolute difference; infinite where one of them is not finite and the other is not the same."""
    changed: int
    """Values that differ."""
    squares: float
    """Sum of squared differences."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder (`model*.safetensors`, all shards) by name; raise ValueError for another format."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            length, size = int.from_bytes(stream.read(8), "little"), file.stat().st_size
            text = stream.read(length) if 8 + length <= size else b""  # a made-up length reads nothing
        try:
            header = _HEADER.validate_json(text, strict=True)
        except ValueError:
            raise ValueError(f"{file}: no safetensors file; its header cannot be read") from None
        for name, about in header.items():
            if isinstance(about, _Tensor):
                found[name] = StoredTensor(file, about.dtype, tuple(about.shape), 8 + length + about.data_offsets[0])
    return found


def compare_weights(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]
) -> Iterator[TensorDifference]:
    """Return the tensors of equal name and shape, equal ones included, in the order of `before`."""
    for name, old in before.items():
        new = after.get(name)
        if new is not None and new.shape == old.shape:
            yield _compare_tensor(name, old, new)


def _compare_tensor(name: str, old: StoredTensor, new: StoredTensor) -> TensorDifference:
    largest, changed, squares = 0.0, 0, 0.0
    for left, right in zip(old.pieces(), new.pieces(), strict=True):
        unequal = (left != right) & ~(numpy.isnan(left) & numpy.isnan(right))
        if unequal.any():
            distances = numpy.nan_to_num(numpy.abs(right[unequal] - left[unequal]), nan=numpy.inf)
            largest, changed = max(largest, float(distances.max())), changed + int(unequal.sum())
            squares += float(numpy.square(distances).sum())
    return TensorDifference(name, old.shape, largest, changed, squares)
