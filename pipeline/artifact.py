"""Artifacts: values of one field, the digest, that name sealed content in the store.

`Table` is one Arrow IPC file with a declared schema, `Folder` any files. Stages hand these references to one another and
nothing else: never a path, a tensor or an open handle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeAlias

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.store import DamagedArtifactError, MissingArtifactError, current_store
from pipeline.store.context import current_call, current_provenance

BATCH_ROWS: Final = 65_536
"""Rows of a record batch of a table's file; the last has what is left. A smaller table is one batch. Part of what a digest
depends on: changing it renames every larger table. Larger ones would bring Arrow's lists to their limit of 2^31 elements."""

BATCH_SIZE = 2**31 - 1
"""Bytes of text, or elements of lists, that a column has in one record batch: Arrow's offsets of 32 bits reach no further."""

_TABLE_FILE = "table.arrow"
_NOT_OF_TYPE = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    pa.ArrowNotImplementedError,
    pa.ArrowCapacityError,
    OverflowError,
    TypeError,
    ValueError,
)

Rows: TypeAlias = pa.Table | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""An Arrow table, columns, or a list of rows."""


class ArtifactError(ValueError):
    """Content that does not fit its type; names the columns or rows at fault."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A reference to sealed content in the current store."""

    digest: str
    """Name in the store. Of data: its content digest, a sha256 of the payload (names, sizes, hashes) and schema. Of trained
    state: its derivation, which is the key of the stage call that made it."""
    action: str | None = dataclasses.field(default=None, compare=False, repr=False)
    """Key of the stage call that returned this reference. No part of its identity: it leads to the metrics of *this* call,
    where another call (another configuration) may have produced equal content."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return what the stage recorded with `record_metrics`; the same numbers when it was cached."""
        store = current_store()
        source = store.action(self.action) if self.action else store.manifest(self.digest).get("provenance") or {}
        return dict(source.get("metrics", {}))

    @property
    def content(self) -> str | None:
        """Return the content digest, which differs from the name where that is a derivation; nothing is verified.

        None: trained state whose weights were not written.
        """
        manifest = self._manifest()
        return None if manifest.get("unwritten") else str(manifest["digest"])

    @property
    def state(self) -> str:
        """Return what an engine that has these weights in memory knows them by: the content digest if written at once."""
        manifest = self._manifest()
        return str(manifest.get("state") or manifest["digest"])

    def _manifest(self) -> dict[str, Any]:
        store = current_store()
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError):
            return store.manifest(self.digest)
        store.path(self.digest, partial=True)  # trained state is replayed
        return store.manifest(self.digest)

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.digest[:12]}"


class Folder(Artifact):
    """A folder of files."""

    @classmethod
    def write(cls, fill: Callable[[Path], None]) -> Self:
        """Publish what `fill` writes into an empty folder."""
        about = {"type": cls.__name__, "provenance": current_provenance()}
        return cls(current_store().publish(fill, about=about))

    @classmethod
    def write_derived(cls, fill: Callable[[Path], None]) -> str:
        """Publish trained state under the key of the running stage call, and return its content digest; `derived` refers to it.

        State of that name that is in the store already stays: other artifacts were made from it. Where its content differs from
        what `fill` wrote (hardware without a fixed order of sums), a warning names both.
        """
        call = current_call()
        about = {"type": cls.__name__, "provenance": call and call.provenance()}
        name, remedy = (call.key, call.remedy) if call else (None, "")
        return current_store().publish(fill, about=about, name=name, remedy=remedy)

    @classmethod
    def write_description(cls, fill: Callable[[Path], None], unwritten: Sequence[str]) -> str:
        """Publish trained state without the files named in `unwritten`; return the name of the state in memory (`state`).

        `fill` writes what describes it. Whoever needs the rest has it written, by an engine that has the state, or replayed.
        Of what is in the store already nothing is replaced.
        """
        call = current_call()
        assert call is not None, "only the result of a stage call can be made again"
        about = {"type": cls.__name__, "provenance": call.provenance(), "unwritten": sorted(unwritten)}
        state, made = secrets.token_hex(32), cls(call.key)
        current_store().publish(fill, about=about | {"state": state}, name=call.key)
        return state if made.content else made.state  # weights that are there may differ: they are loaded again

    @classmethod
    def derived(cls, content: str) -> Self:
        """Return the reference to what `write_derived` published; outside a stage its content digest is its name."""
        call = current_call()
        return cls(call.key if call else content)

    @property
    def path(self) -> Path:
        """Return the verified folder; its files are read-only."""
        return current_store().path(self.digest)

    @property
    def described(self) -> Path:
        """Return the verified folder, in which files of trained state may be missing that were not written."""
        return current_store().path(self.digest, partial=True)


class Table(Artifact):
    """An Arrow table; subclasses declare `schema`, whose nullable flags are enforced."""

    schema: ClassVar[pa.Schema]
    optional: ClassVar[tuple[str, ...]] = ()
    """Nullable columns that may be left out where a table is written; they are null then."""

    @classmethod
    def write(cls, rows: Rows | Iterator[Rows]) -> Self:
        """Publish a table given as Arrow table, as columns, as a list of rows, or as an iterator of such parts.

        How it is given makes no difference to its bytes. Of parts no more than `BATCH_ROWS` rows and one part are held at once,
        and what making them records (`record_metrics`) counts as recorded before.

        Raises:
            ArtifactError: names missing, unexpected and wrongly typed columns, or the first null in a column without nulls.
        """
        about: dict[str, Any] = {"type": cls.__name__, "rows": 0}
        batches = cls._batches(rows if isinstance(rows, Iterator) else iter([rows]))
        # Two at first: what fits into one is made before the store is asked, and an error in making it never taken for its own.
        ready = list(itertools.islice(batches, 2))

        def fill(folder: Path) -> None:
            with pa.OSFile(str(folder / _TABLE_FILE), "wb") as sink, pa.ipc.new_file(sink, cls.schema) as writer:
                while ready:
                    about["rows"] += ready[0].num_rows
                    writer.write_table(ready.pop(0))
                    ready.extend(itertools.islice(batches, 0 if ready else 1))
            about["provenance"] = current_provenance()

        return cls(current_store().publish(fill, about=about, schema=str(cls.schema)))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows, or these columns in this order, memory-mapped; the file's hash was verified before it was parsed."""
        path = current_store().path(self.digest) / _TABLE_FILE
        try:
            # Without `included_fields`, with which pyarrow copies what it is asked for.
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            self._check_columns(table.column_names)
            table = table.select(list(columns or table.column_names))
            table.validate(full=True)  # a sound hash only says that the bytes are those its writer meant
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{path}: not a readable Arrow file: {error}") from None
        return self._fitting(table, columns or self.schema.names)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries."""
        rows: list[dict[str, Any]] = self.read().to_pylist()
        return rows

    @classmethod
    def conform(cls, rows: Rows) -> pa.Table:
        """Return `rows` as an Arrow table of exactly this schema; raise ArtifactError where they do not fit."""
        names = _column_names(rows, cls)
        absent = [name for name in cls.optional if name not in names] if names else []
        cls._check_columns([*names, *absent])
        table = rows if isinstance(rows, pa.Table) else cls._build(rows, absent)
        for name in absent:
            table = table.append_column(name, pa.nulls(table.num_rows, cls.schema.field(name).type))
        return cls._fitting(table, cls.schema.names)

    @classmethod
    def _check_columns(cls, names: list[str]) -> None:
        if sorted(names) != sorted(cls.schema.names):
            raise ArtifactError(_column_complaint(cls.__name__, names, cls.schema.names))

    @classmethod
    def _fitting(cls, table: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Return `columns` of `table`, if they have their types, and values where they must."""
        table, fields = table.select(list(columns)), [cls.schema.field(column) for column in columns]
        for field in fields:
            column = table.column(field.name)
            if column.type != field.type:
                raise ArtifactError(f"{cls.__name__}.{field.name}: expected {field.type}, found {column.type}")
            if not field.nullable and column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise ArtifactError(f"{cls.__name__}.{field.name}: row {row} is null; this column must have a value")
        return pa.Table.from_arrays(table.columns, schema=pa.schema(fields))  # `cast` would copy every list

    @classmethod
    def _batches(cls, parts: Iterator[Rows]) -> Iterator[pa.Table]:
        """Return canonical tables of `BATCH_ROWS` rows, the last with the rest; at least one, which may be empty."""
        held, written, before = cls.conform([]), 0, 0
        for part in parts:
            try:
                table = cls.conform(part)
            except ArtifactError as error:
                raise ArtifactError(f"{error} (of the part behind row {before})" if before else str(error)) from None
            before += table.num_rows
            held = pa.concat_tables([held, table])
            while (count := _batch_rows(held)) == BATCH_ROWS or count < held.num_rows:
                yield _canonical(held.slice(0, count))
                held, written = held.slice(count), written + count
        if held.num_rows or not written:
            yield _canonical(held)

    @classmethod
    def _build(cls, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], absent: Sequence[str]) -> pa.Table:
        arrays, fields = [], [field for field in cls.schema if field.name not in absent]
        for field in fields:
            values = rows[field.name] if isinstance(rows, Mapping) else [row[field.name] for row in rows]
            try:
                arrays.append(_column(values, field.type))
            except _NOT_OF_TYPE as error:
                where = f"{cls.__name__}.{field.name}: {_first_wrong(values, field.type)}"
                raise ArtifactError(f"{where}; expected {field.type}: {error}") from None
        if len({len(array) for array in arrays}) > 1:
            lengths = dict(zip([field.name for field in fields], map(len, arrays), strict=True))
            raise ArtifactError(f"{cls.__name__}: columns of different lengths: {lengths}")
        # Without nullability here: `conform` finds the null and names its row.
        return pa.table(arrays, names=[field.name for field in fields])


def take_rows(table: pa.Table, rows: Sequence[int] | NDArray[numpy.int64]) -> pa.Table:
    """Return `table.take(rows)`, also for a column with more text than one array holds, where Arrow overflows."""
    if table.nbytes <= BATCH_SIZE:
        return table.take(rows)
    return pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in rows)])


def _batch_rows(table: pa.Table) -> int:
    """Return the rows of the first record batch: `BATCH_ROWS`, or as many as keep every column within `BATCH_SIZE`.

    A function of the rows alone, however they lie in chunks.
    """
    import pyarrow.compute as pc

    first = table.slice(0, BATCH_ROWS)
    if first.nbytes <= BATCH_SIZE:  # no column can have more
        return int(first.num_rows)
    counts: list[int] = [first.num_rows]
    for column in first.columns:
        if pa.types.is_string(column.type):
            sizes = pc.binary_length(column)
        elif pa.types.is_list(column.type):
            sizes = pc.list_value_length(column)
        else:
            continue
        ends = numpy.cumsum(pc.fill_null(sizes, 0).to_numpy().astype(numpy.int64))
        counts.append(int(numpy.searchsorted(ends, BATCH_SIZE, side="right")))
    rows: int = max(1, min(counts))
    return rows


def _canonical(table: pa.Table) -> pa.Table:
    """Return equal tables with equal bytes, and so one digest: a single chunk, no slice of larger buffers, zeros under nulls.

    Only `take` rebuilds every buffer, nested ones included; `combine_chunks` leaves the values under nulls.
    """
    return table.combine_chunks().take(numpy.arange(table.num_rows))


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    """Return `values` as an array of type `kind`; pyarrow alone would silently cut 1.5 to the integer 1."""
    array = pa.array(values, type=kind)
    if pa.types.is_integer(_innermost(kind)) and pa.types.is_floating(_innermost(pa.array(values).type)):
        raise pa.ArrowTypeError("a number that is not an integer")
    return array


def _innermost(kind: pa.DataType) -> pa.DataType:
    return _innermost(kind.value_type) if pa.types.is_list(kind) else kind


def _first_wrong(values: Any, kind: pa.DataType) -> str:
    """Return which row cannot have type `kind`."""
    for row, value in enumerate(values):
        try:
            _column([value], kind)
        except _NOT_OF_TYPE:
            return f"row {row} is {value!r}"[:200]
    return "the column has another type"


def _column_names(rows: Rows, cls: type[Table]) -> list[str]:
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
    parts += [f"{name!r} occurs {found.count(name)} times" for name in sorted(set(found)) if found.count(name) > 1]
    return f"{table}: wrong columns: {', '.join(parts)}; expected {expected}"
