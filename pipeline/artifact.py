"""Artifacts: values of one field, the digest, that name sealed content in the store.

`Table` is one Arrow IPC file with a declared schema, `Folder` any files. Stages hand these references to one another and
nothing else: never a path, a tensor or an open handle.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy
import pyarrow as pa

from pipeline.provenance import current_provenance
from pipeline.store import current_store

__all__ = ["Artifact", "ArtifactError", "Folder", "Table"]

_TABLE_FILE = "table.arrow"
_NOT_OF_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError, ValueError)


class ArtifactError(ValueError):
    """Content that does not fit its type; names the columns or rows at fault."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A reference to sealed content in the current store."""

    digest: str
    """sha256 of the payload (names, sizes, hashes) and schema."""
    action: str | None = dataclasses.field(default=None, compare=False, repr=False)
    """Key of the stage call that returned this reference. No part of its identity: it leads to the metrics of *this* call,
    where another call (another configuration) may have produced equal content."""

    @property
    def metrics(self) -> dict[str, float]:
        """What the stage recorded about itself with `record_metrics`; the same numbers when it was cached."""
        store = current_store()
        source = store.action(self.action) if self.action else store.manifest(self.digest).get("provenance") or {}
        return dict(source.get("metrics", {}))

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.digest[:12]}"


class Folder(Artifact):
    """A folder of files."""

    @classmethod
    def write(cls, fill: Callable[[Path], None]) -> Self:
        """Publish what `fill` writes into an empty folder."""
        about = {"type": cls.__name__, "provenance": current_provenance()}
        return cls(current_store().publish(fill, about=about))

    @property
    def path(self) -> Path:
        """The verified folder; its files are read-only."""
        return current_store().path(self.digest)


class Table(Artifact):
    """An Arrow table; subclasses declare `schema`, whose nullable flags are enforced."""

    schema: ClassVar[pa.Schema]

    @classmethod
    def write(cls, rows: pa.Table | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Self:
        """Publish a table given as Arrow table, as columns or as a list of rows.

        Raises:
            ArtifactError: names missing, unexpected and wrongly typed columns, or the first null in a column without nulls.
        """
        table = _canonical(cls.conform(rows))

        def fill(folder: Path) -> None:
            with pa.OSFile(str(folder / _TABLE_FILE), "wb") as sink, pa.ipc.new_file(sink, cls.schema) as writer:
                writer.write_table(table)

        about = {"type": cls.__name__, "rows": table.num_rows, "provenance": current_provenance()}
        return cls(current_store().publish(fill, about=about, schema=str(cls.schema)))

    def read(self) -> pa.Table:
        """The rows, memory-mapped; the file's hash was verified before it was parsed."""
        path = current_store().path(self.digest) / _TABLE_FILE
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate(full=True)  # a sound hash only says that the bytes are those its writer meant
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{path}: not a readable Arrow file: {error}") from None
        return self.conform(table)

    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        rows: list[dict[str, Any]] = self.read().to_pylist()
        return rows

    @classmethod
    def conform(cls, rows: pa.Table | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pa.Table:
        """`rows` as an Arrow table of exactly this schema, or an ArtifactError."""
        names = _column_names(rows, cls)
        if sorted(names) != sorted(cls.schema.names):
            raise ArtifactError(_column_complaint(cls.__name__, names, cls.schema.names))
        if not isinstance(rows, pa.Table):
            rows = cls._build(rows)
        table = rows.select(cls.schema.names).replace_schema_metadata(None)
        for field in cls.schema:
            column = table.column(field.name)
            if column.type != field.type:
                raise ArtifactError(f"{cls.__name__}.{field.name}: expected {field.type}, found {column.type}")
            if not field.nullable and column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise ArtifactError(f"{cls.__name__}.{field.name}: row {row} is null; this column must have a value")
        return table.cast(cls.schema)

    @classmethod
    def _build(cls, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pa.Table:
        arrays = []
        for field in cls.schema:
            values = rows[field.name] if isinstance(rows, Mapping) else [row[field.name] for row in rows]
            try:
                arrays.append(_column(values, field.type))
            except _NOT_OF_TYPE as error:
                where = f"{cls.__name__}.{field.name}: {_first_misfit(values, field.type)}"
                raise ArtifactError(f"{where}; expected {field.type}: {error}") from None
        if len({len(array) for array in arrays}) > 1:
            lengths = dict(zip(cls.schema.names, map(len, arrays), strict=True))
            raise ArtifactError(f"{cls.__name__}: columns of different lengths: {lengths}")
        # Without nullability here: `conform` finds the null and names its row.
        return pa.table(arrays, names=cls.schema.names)


def _canonical(table: pa.Table) -> pa.Table:
    """Equal tables with equal bytes, and so with one digest: a single chunk, no slice of larger buffers, zeros under nulls.

    Only `take` rebuilds every buffer, nested ones included; `combine_chunks` leaves what stands under nulls.
    """
    return table.combine_chunks().take(numpy.arange(table.num_rows))


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    """`values` as an array of type `kind`; pyarrow alone would silently cut 1.5 to the integer 1."""
    array = pa.array(values, type=kind)
    if pa.types.is_integer(_innermost(kind)) and pa.types.is_floating(_innermost(pa.array(values).type)):
        raise pa.ArrowTypeError("a number that is not an integer")
    return array


def _innermost(kind: pa.DataType) -> pa.DataType:
    return _innermost(kind.value_type) if pa.types.is_list(kind) else kind


def _first_misfit(values: Any, kind: pa.DataType) -> str:
    """Which row cannot have type `kind`."""
    for row, value in enumerate(values):
        try:
            _column([value], kind)
        except _NOT_OF_TYPE:
            return f"row {row} is {value!r}"[:200]
    return "the column has another type"


def _column_names(rows: pa.Table | Mapping[str, Any] | Sequence[Mapping[str, Any]], cls: type[Table]) -> list[str]:
    if isinstance(rows, pa.Table):
        return list(rows.column_names)
    if isinstance(rows, Mapping):
        return list(rows)
    if not rows:
        return list(cls.schema.names)
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ArtifactError(
                f"{cls.__name__}: row {number} has the columns {sorted(row)}, row 0 has {sorted(rows[0])}"
            )
    return list(rows[0])


def _column_complaint(table: str, found: list[str], expected: list[str]) -> str:
    parts = []
    for name in sorted(set(found) - set(expected)):
        near = difflib.get_close_matches(name, expected, n=1)
        parts.append(f"unexpected {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    parts += [f"missing {name!r}" for name in sorted(set(expected) - set(found))]
    parts += [f"{name!r} stands {found.count(name)} times" for name in sorted(set(found)) if found.count(name) > 1]
    return f"{table}: wrong columns: {', '.join(parts)}; expected {expected}"
