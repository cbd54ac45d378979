"""Align tables by key, as Arrow columns and numpy arrays: the one way in which stages join.

A key is (question_id, sample), or other columns. No Python object is made for a row: a million rows take about a second. A
column of lists becomes `Ragged`, the values of all rows one after another with offsets.

Shapes: N rows, M values of all rows of a ragged column, Q groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifact import take_rows

KEY: Final = ("question_id", "sample")
"""Columns that name an output."""

Places = NDArray[np.int64]


class JoinError(ValueError):
    """Name tables whose rows do not match; the attributes have the first key of each kind of fault, or None."""

    def __init__(self, table: str, text: str, **first: Any) -> None:
        super().__init__(text)
        self.table = table
        self.missing: Any = first.get("missing")
        self.extra: Any = first.get("extra")
        self.repeated: Any = first.get("repeated")


@dataclass(frozen=True)
class Ragged:
    """Hold a column of lists: the values of all N rows one after another."""

    values: NDArray[Any]
    """M values; a null among them is NaN."""
    offsets: Places
    """N + 1 places: row i has `values[offsets[i] : offsets[i + 1]]`."""
    null: NDArray[np.bool_]
    """Whether the row has no list (N); it has no values."""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        """Return a list column as arrays; without a copy where it is one chunk."""
        import pyarrow.compute as pc

        length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        if not parts:
            parts = [np.empty(0, column.type.value_type.to_pandas_dtype())]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return cls(values, np.concatenate([[0], np.cumsum(length_N)]).astype(np.int64), column.is_null().to_numpy())

    def __len__(self) -> int:
        return len(self.null)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> Places:
        """Return how many values each row has (N)."""
        return np.diff(self.offsets)

    @property
    def row_of_value(self) -> Places:
        """Return for each value its row (M)."""
        return np.repeat(np.arange(len(self)), self.lengths)


def align(
    wanted: pa.Table,
    found: pa.Table,
    name: str,
    *,
    to: str = "outputs",
    by: Sequence[str] = KEY,
    extra: bool = False,
    missing: bool = False,
    several: bool = False,
) -> pa.Table:
    """Return the rows of `found` in the order of `wanted`, one for each.

    Args:
        name: of `found`, for errors.
        to: name of `wanted`.
        by: columns of the key, in both tables.
        extra: `found` may have rows that `wanted` lacks; they are left out.
        missing: `wanted` may have rows that `found` lacks; theirs are null.
        several: rows of `wanted` may share a key, as outputs share a question.

    Raises:
        JoinError: a key is missing, extra, repeated or null; names the first one and the table.
    """
    code_N, code_F = _codes([wanted, found], by)
    order_F = np.argsort(code_F, kind="stable")
    sorted_F = code_F[order_F]
    _refuse_repeated(found, code_F, sorted_F, name, by)
    if not several:
        _refuse_repeated(wanted, code_N, np.sort(code_N), to, by)
    place_N = np.searchsorted(sorted_F, code_N)
    is_there_N = np.zeros(len(code_N), dtype=bool)
    inside_N = place_N < len(sorted_F)
    is_there_N[inside_N] = sorted_F[place_N[inside_N]] == code_N[inside_N]
    row_N = np.full(len(code_N), -1)
    row_N[is_there_N] = order_F[place_N[is_there_N]]
    is_wanted_F = np.zeros(len(code_F), dtype=bool)
    is_wanted_F[row_N[is_there_N]] = True
    lost = np.flatnonzero(~is_there_N) if not missing else np.empty(0, np.int64)
    left_over = np.flatnonzero(~is_wanted_F) if not extra else np.empty(0, np.int64)
    if len(lost) or len(left_over):
        raise _mismatch(wanted, found, name, to, by, lost, left_over)
    if len(row_N) == len(code_F) and (row_N == np.arange(len(row_N))).all():
        return found
    if is_there_N.all():
        return take_rows(found, row_N)
    return found.take(pa.array(row_N, mask=~is_there_N))


def require_unique(table: pa.Table, name: str, by: Sequence[str] = KEY) -> None:
    """Refuse a table with a key that occurs more than once.

    Raises:
        JoinError: names the first such key.
    """
    (code_N,) = _codes([table], by)
    _refuse_repeated(table, code_N, np.sort(code_N), name, by)


def same_keys(one: pa.Table, other: pa.Table, by: Sequence[str] = KEY) -> bool:
    """Return whether two tables have the same keys in the same order."""
    return all(one[column].equals(other[column]) for column in by)


def group_rows(column: pa.ChunkedArray) -> tuple[list[Any], Places]:
    """Return the Q distinct values in the order in which they first occur, and for each row the place of its own (N)."""
    dictionary, place_N = _encode(column)
    return dictionary.to_pylist(), place_N


def key_at(table: pa.Table, row: int | np.integer[Any], by: Sequence[str] = KEY) -> Any:
    """Return the key of a row as Python values, for an error that names it: ('q1', 3), or 'q1' for one column."""
    key = tuple(table[column][int(row)].as_py() for column in by)
    return key if len(key) > 1 else key[0]


def per_token(
    table: pa.Table,
    column: str,
    length_N: Places,
    name: str,
    *,
    masked: bool = False,
    written_M: NDArray[np.bool_] | None = None,
) -> Ragged:
    """Return a column with one finite number for each output token.

    Args:
        table: with keys, in the order of `length_N`.
        length_N: tokens of each output.
        name: of the numbers, for errors.
        masked: whether rows may be null; those have no values.
        written_M: which tokens of all rows have a number (`written_by_policy`); at the others it is 0. None: all have.

    Raises:
        ValueError: names the row and the token: no list, another number of values than tokens, a value that is not finite.
    """
    found = Ragged.of(table[column])
    absent = np.flatnonzero(found.null) if not masked else np.empty(0, np.int64)
    if len(absent):
        raise ValueError(f"output {key_at(table, absent[0])} has no {name}; they were not recorded when it was made")
    wrong = np.flatnonzero((found.lengths != length_N) & ~found.null)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"output {key_at(table, row)}: expected {length_N[row]} {name}, one for each token, found {found.lengths[row]}"
        )
    if written_M is not None:
        written_M = written_M[~np.repeat(found.null, length_N)]
        found = replace(found, values=np.where(written_M, found.values, np.zeros(1, found.values.dtype)))
    bad = np.flatnonzero(~np.isfinite(found.values))
    if len(bad):
        row = int(np.searchsorted(found.offsets, bad[0], side="right")) - 1
        token = bad[0] - found.offsets[row]
        raise ValueError(
            f"output {key_at(table, row)}: {name} must be finite, found {found.values[bad[0]]} at token {token}"
        )
    return found


def written_by_policy(table: pa.Table) -> NDArray[np.bool_]:
    """Return for each output token of `Rollouts` whether the policy wrote it, not an environment (M, as `output_ids`).

    Args:
        table: with the key, `output_ids` and `turns`.

    Raises:
        ValueError: names the row: turns that are empty, overlap, are out of order, or lie beyond the output.
    """
    output, turns = Ragged.of(table["output_ids"]), table["turns"].combine_chunks()
    written_M = np.repeat(turns.is_null().to_numpy(zero_copy_only=False), output.lengths)
    if turns.null_count == len(turns):
        return written_M
    spans = turns.flatten()
    start_S, end_S = (spans.field(name).to_numpy().astype(np.int64) for name in ("start", "end"))
    row_S = np.repeat(np.arange(len(turns)), turns.value_lengths().fill_null(0).to_numpy())
    before_S = np.where(np.diff(row_S, prepend=-1) == 0, np.concatenate([[0], end_S])[:-1], 0)
    bad = np.flatnonzero((start_S < before_S) | (end_S <= start_S) | (end_S > output.lengths[row_S]))
    if len(bad):
        row, spans_found = row_S[bad[0]], [(span["start"], span["end"]) for span in turns[int(row_S[bad[0]])].as_py()]
        raise ValueError(
            f"output {key_at(table, row)}: expected turns [start, end) within its {output.lengths[row]} tokens, in order, "
            f"none empty, found {spans_found}"
        )
    change_M = np.zeros(len(output.values) + 1, dtype=np.int64)
    np.add.at(change_M, output.offsets[row_S] + start_S, 1)
    np.add.at(change_M, output.offsets[row_S] + end_S, -1)
    return written_M | (np.cumsum(change_M[:-1]) > 0)


def turns_of(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return [start, end) of each turn of a row of `Rollouts` among its tokens; an output without turns is one."""
    return [(span["start"], span["end"]) for span in row["turns"] or ()] or [(0, len(row["text_ends"]))]


def written_rows(table: pa.Table) -> list[tuple[bool, ...] | None]:
    """Return `written_by_policy` by row; None where the policy wrote the whole output."""
    null_N = table["turns"].is_null().to_pylist()
    if all(null_N):
        return [None] * table.num_rows
    written = np.split(written_by_policy(table), np.cumsum(Ragged.of(table["output_ids"]).lengths)[:-1])
    return [None if null else tuple(row.tolist()) for row, null in zip(written, null_N, strict=True)]


def written_lengths(table: pa.Table) -> Places:
    """Return how many tokens of each row the policy wrote (N); arguments and errors as `written_by_policy`."""
    output = Ragged.of(table["output_ids"])
    return np.diff(np.concatenate([[0], np.cumsum(written_by_policy(table))])[output.offsets])


def with_scores(keys: pa.Table, unsound: str, **columns: Sequence[Sequence[float]]) -> pa.Table:
    """Append columns of one number per token.

    Args:
        unsound: what an error says of a number that is not finite; `{name}` in it is the column's.

    Raises:
        ValueError: a number is not finite; names the row.
    """
    table = keys
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        found = Ragged.of(table[name])
        bad = found.row_of_value[~np.isfinite(found.values)]
        if len(bad):
            raise ValueError(f"output {key_at(keys, bad[0])}: {unsound.format(name=name)}")
    return table


def _codes(tables: Sequence[pa.Table], by: Sequence[str]) -> list[Places]:
    """Number each row of each table, equal keys alike.

    The numbers of one column lie below 2^31, so that those of two columns fit into 64 bits.
    """
    counts = [table.num_rows for table in tables]
    code_N = np.zeros(sum(counts), dtype=np.int64)
    for column in by:
        for table in tables:
            if table[column].null_count:
                row = table[column].is_null().to_pylist().index(True)
                raise JoinError(
                    "", f"expected a {column} in every row of tables that are joined, found null in row {row}"
                )
        chunks = [chunk for table in tables for chunk in table[column].chunks]
        dictionary, place_N = _encode(pa.chunked_array(chunks, type=tables[0][column].type))
        code_N = code_N * len(dictionary) + place_N
    return np.split(code_N, np.cumsum(counts)[:-1])


def _encode(column: pa.ChunkedArray) -> tuple[pa.Array, Places]:
    """Return distinct values in the order in which they first occur, and the place of each row's among them."""
    encoded = column.dictionary_encode()  # all chunks share one dictionary
    if not encoded.num_chunks:
        return pa.array([], column.type), np.empty(0, np.int64)
    place_N = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])
    return encoded.chunk(0).dictionary, place_N.astype(np.int64)


def _refuse_repeated(table: pa.Table, code_N: Places, sorted_N: Places, name: str, by: Sequence[str]) -> None:
    twice = sorted_N[1:][sorted_N[1:] == sorted_N[:-1]]
    if len(twice):
        row = np.flatnonzero(np.isin(code_N, twice))[0]
        key = key_at(table, row, by)
        times = int((code_N == code_N[row]).sum())
        text = f"{name} hold {key!r} more than once: expected one row for each ({', '.join(by)}), found {times} of it"
        raise JoinError(name, text, repeated=key)


def _mismatch(
    wanted: pa.Table, found: pa.Table, name: str, to: str, by: Sequence[str], lost: Places, left_over: Places
) -> JoinError:
    faults: list[str] = []
    first: dict[str, Any] = {}
    if len(lost):
        first["missing"] = key_at(wanted, lost[0], by)
        faults.append(f"{len(lost)} of {wanted.num_rows} {to} without a row, first {first['missing']!r}")
    if len(left_over):
        first["extra"] = key_at(found, left_over[0], by)
        faults.append(f"{len(left_over)} of {found.num_rows} rows without {to}, first {first['extra']!r}")
    return JoinError(
        name,
        f"{name} do not match {to}: expected one row for each ({', '.join(by)}), found {' and '.join(faults)}; "
        f"join tables that were made from the same {to}",
        **first,
    )
