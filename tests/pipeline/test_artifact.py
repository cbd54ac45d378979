"""Artifacts: equal content has one digest; a table that does not fit its schema names column and row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import artifact
from pipeline.artifact import BATCH_ROWS, Artifact, ArtifactError, Folder, Table, take_rows
from pipeline.store import Store
from pipeline.store.files import DamagedArtifactError, StoreError


class Numbers(Table):
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("x", pa.int64())])


class Nested(Table):
    schema = pa.schema(
        [
            pa.field("flag", pa.bool_()),
            pa.field("score", pa.float64()),
            pa.field("text", pa.string()),
            pa.field("ids", pa.list_(pa.int32())),
            pa.field("parts", pa.map_(pa.string(), pa.float64())),
        ]
    )


ROWS = [{"id": "a", "x": 1}, {"id": "b", "x": None}, {"id": "c", "x": -3}]


def test_rows_columns_and_arrow_tables_of_equal_content_have_one_digest(store: Store) -> None:
    columns = {"x": [1, None, -3], "id": ["a", "b", "c"]}
    arrow = pa.table({"x": pa.array([1, None, -3]), "id": pa.array(["a", "b", "c"])})
    assert len({Numbers.write(given).digest for given in (ROWS, columns, arrow)}) == 1
    assert len(list(store.digests())) == 1


def test_a_read_gives_back_the_rows_in_order(store: Store) -> None:
    assert Numbers.write(ROWS).rows() == ROWS
    assert Numbers.write([]).read().num_rows == 0


row = st.fixed_dictionaries(
    {
        "flag": st.none() | st.booleans(),
        "score": st.none() | st.floats(allow_nan=False),
        "text": st.none() | st.text(max_size=4),
        "ids": st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=3),
        "parts": st.none()
        | st.lists(st.tuples(st.text(max_size=2), st.none() | st.floats(allow_nan=False)), max_size=2),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=20), cut=st.integers(0, 20), pad=st.integers(1, 9))
def test_chunks_and_slices_do_not_change_a_digest(store: Store, rows: list[dict[str, Any]], cut: int, pad: int) -> None:
    plain = Nested.conform(rows)
    chunked = pa.concat_tables([plain.slice(0, cut), plain.slice(cut)])
    sliced = pa.concat_tables([plain.slice(0, 1)] * pad + [plain, plain]).combine_chunks().slice(pad, len(rows))
    assert {Nested.write(table).digest for table in (chunked, sliced)} == {Nested.write(plain).digest}


def with_garbage(seed: int) -> pa.Table:
    """Always the same values; the bytes beneath nulls, and the last bits of each bitmap, are random."""
    draw = np.random.default_rng(seed)
    n = 11
    valid = np.arange(n) % 3 != 1

    def bits(mask: np.ndarray[Any, Any]) -> pa.Buffer:
        tail = draw.integers(0, 2, -len(mask) % 8).astype(bool)
        return pa.py_buffer(np.packbits(np.concatenate([mask, tail]), bitorder="little").tobytes())

    def numbers(count: int, mask: np.ndarray[Any, Any], kind: pa.DataType, numpy_type: type) -> pa.Array:
        values: np.ndarray[Any, Any] = np.arange(count).astype(numpy_type)
        values[~mask] = draw.integers(1, 100, int((~mask).sum()))
        return pa.Array.from_buffers(kind, count, [bits(mask), pa.py_buffer(values.tobytes())])

    flags = np.where(valid, np.arange(n) % 2 == 0, draw.integers(0, 2, n).astype(bool))
    letters = np.frombuffer(b"abc" * n, dtype=np.uint8).reshape(n, 3).copy()
    letters[~valid] = draw.integers(97, 122, (int((~valid).sum()), 3))
    inner = np.arange(2 * n) % 4 != 0
    pairs = pa.py_buffer(np.arange(0, 2 * n + 1, 2, dtype=np.int32).tobytes())
    threes = pa.py_buffer(np.arange(0, 3 * n + 1, 3, dtype=np.int32).tobytes())
    columns = {
        "flag": pa.Array.from_buffers(pa.bool_(), n, [bits(valid), bits(flags)]),
        "score": numbers(n, valid, pa.float64(), np.float64),
        "text": pa.Array.from_buffers(pa.string(), n, [bits(valid), threes, pa.py_buffer(letters.tobytes())]),
        "ids": pa.Array.from_buffers(
            pa.list_(pa.int32()), n, [bits(valid), pairs], children=[numbers(2 * n, inner, pa.int32(), np.int32)]
        ),
        "parts": pa.MapArray.from_arrays(
            pa.array(range(0, 2 * n + 1, 2), pa.int32()),
            pa.array([f"k{i}" for i in range(2 * n)]),
            numbers(2 * n, inner, pa.float64(), np.float64),
        ),
    }
    return pa.table(columns)


def test_bytes_beneath_nulls_do_not_change_a_digest(store: Store) -> None:
    tables = [with_garbage(seed) for seed in range(8)]
    assert all(table.equals(tables[0]) for table in tables)
    digests = {Nested.write(table).digest for table in tables}
    assert digests == {Nested.write(tables[0].to_pylist()).digest}


def test_one_changed_value_changes_the_digest_and_so_does_the_schema(store: Store) -> None:
    class Optional(Table):
        schema = pa.schema([pa.field("id", pa.string()), pa.field("x", pa.int64())])

    digest = Numbers.write(ROWS).digest
    assert Numbers.write([*ROWS[:2], {"id": "c", "x": -4}]).digest != digest
    assert Numbers.write(ROWS[::-1]).digest != digest
    assert Optional.write(ROWS).digest != digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"id": ["a"]}, "Numbers: wrong columns: missing 'x'"),
        ({}, "wrong columns: missing 'id', missing 'x'"),
        ({"id": ["a"], "x": [1], "xs": [1]}, r"unexpected 'xs'"),
        ({"ids": ["a"], "x": [1]}, r"unexpected 'ids' \(did you mean 'id'\?\), missing 'id'"),
        ([{"id": "a", "x": 1}, {"id": "b", "x": "2nd"}], r"Numbers.x: row 1 is '2nd'; expected int64"),
        ([{"id": "a", "x": 1}, {"id": 7, "x": 2}], r"Numbers.id: row 1 is 7; expected string"),
        ([{"id": "a", "x": 1.5}], r"Numbers.x: row 0 is 1.5; expected int64"),
        ([{"id": "a", "x": 2**70}], r"Numbers.x: row 0 is"),
        ([{"id": "a", "x": 1}, {"id": None, "x": 1}], r"Numbers.id: row 1 is null; this column must have a value"),
        ([{"id": "a", "x": 1}, {"id": "b"}], r"row 1 has the columns \['id'\]"),
        ({"id": ["a", "b"], "x": [1]}, r"columns of different lengths: \{'id': 2, 'x': 1\}"),
        (pa.table({"id": ["a"], "x": ["1"]}), r"Numbers.x: expected int64, found string"),
        (pa.table([["a"], [1], [2]], names=["id", "x", "x"]), r"'x' occurs 2 times"),
        (pa.table({"id": pa.array(["a", None]), "x": [1, 2]}), r"Numbers.id: row 1 is null"),
    ],
)
def test_a_table_that_does_not_fit_names_what_is_wrong_and_leaves_nothing(
    store: Store, rows: Any, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        Numbers.write(rows)
    assert list(store.digests()) == []
    assert list((store.root / "drafts").iterdir()) == []


def test_reading_as_another_table_names_the_columns(store: Store) -> None:
    reference = Numbers.write(ROWS)
    with pytest.raises(ArtifactError, match="Nested: wrong columns"):
        Nested(reference.digest).read()


def test_a_truncated_table_is_found_before_it_is_parsed(store: Store) -> None:
    reference = Numbers.write(ROWS)
    file = store.path(reference.digest) / "table.arrow"
    file.chmod(0o644)
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(DamagedArtifactError, match=r"table.arrow was altered"):
        reference.read()


def test_a_file_with_a_sound_hash_that_is_no_arrow_file_is_an_artifact_error(store: Store) -> None:
    reference = Folder.write(lambda folder: void((folder / "table.arrow").write_bytes(b"nonsense")))
    with pytest.raises(ArtifactError, match="not a readable Arrow file"):
        Numbers(reference.digest).read()


def void(_: object) -> None:
    return None


def fill(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "weights.bin").write_bytes(b"w" * 100)
    (folder / "config.json").write_text("{}")


def test_a_folder_comes_back_whole_and_its_files_are_read_only(store: Store) -> None:
    reference = Folder.write(fill)
    assert (reference.path / "a" / "weights.bin").read_bytes() == b"w" * 100
    assert [file["name"] for file in store.manifest(reference.digest)["files"]] == ["a/weights.bin", "config.json"]
    modes = {path.stat().st_mode & 0o222 for path in reference.path.rglob("*") if path.is_file()}
    assert modes == {0}


def test_the_digest_of_a_folder_depends_on_names_and_bytes_only(store: Store) -> None:
    def slowly(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (1, 1))
        (folder / "config.json").chmod(0o755)
        (folder / "a").mkdir()
        (folder / "a" / "weights.bin").write_bytes(b"w" * 100)

    def renamed(folder: Path) -> None:
        fill(folder)
        (folder / "config.json").rename(folder / "config2.json")

    class Model(Folder):
        pass

    assert Folder.write(fill).digest == Folder.write(slowly).digest == Model.write(fill).digest
    assert Folder.write(renamed).digest != Folder.write(fill).digest


@pytest.mark.parametrize("name", ["manifest.json", "pruned.json", "link"])
def test_a_folder_with_a_link_or_a_name_of_the_stores_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")

    def bad(folder: Path) -> None:
        (folder / name).symlink_to(outside) if name == "link" else (folder / name).write_text("x")

    with pytest.raises(StoreError, match=f"{name}: an artifact holds plain files"):
        Folder.write(bad)
    assert outside.stat().st_mode & 0o200
    assert list(store.digests()) == []


def test_an_error_of_what_fill_reads_elsewhere_is_not_blamed_on_the_store(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"shard-2\.bin") as raised:
        Folder.write(lambda folder: void((tmp_path / "shard-2.bin").read_bytes()))
    assert not isinstance(raised.value, StoreError)


def test_references_are_equal_by_type_and_digest_not_by_the_call_that_made_them() -> None:
    assert Numbers("d", "one") == Numbers("d", "two")
    assert len({Numbers("d"), Nested("d")}) == 2
    assert hash(Artifact("d", "one")) == hash(Artifact("d"))


def many(rows: int) -> pa.Table:
    """Ids of several lengths, a null in three numbers."""
    number = np.arange(rows)
    return pa.table({"id": [f"q{i % 997}" for i in range(rows)], "x": pa.array(number, mask=number % 3 == 1)})


@pytest.mark.parametrize("rows", [BATCH_ROWS, 2 * BATCH_ROWS + 5])
def test_a_table_written_in_parts_has_the_digest_of_the_one_written_at_once(store: Store, rows: int) -> None:
    whole = many(rows)
    at_once = Numbers.write(whole)
    for size in (999, BATCH_ROWS, rows):
        in_parts = Numbers.write(whole.slice(start, size) for start in range(0, rows, size))
        assert in_parts.digest == at_once.digest
    file = pa.ipc.open_file(str(store.path(at_once.digest) / "table.arrow"))
    sizes = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    assert sizes == [BATCH_ROWS] * (rows // BATCH_ROWS) + [5] * (rows > BATCH_ROWS)
    assert store.manifest(at_once.digest)["rows"] == rows
    assert at_once.read().equals(Numbers.conform(whole))


@pytest.mark.parametrize("columns", [None, ["x"], ["x", "id"]])
def test_what_is_read_stays_in_the_file(store: Store, columns: list[str] | None) -> None:
    table = Numbers.write(many(2 * BATCH_ROWS))
    before = pa.total_allocated_bytes()
    read = table.read(columns)
    assert read.nbytes > 1e6
    assert pa.total_allocated_bytes() == before


def test_no_parts_are_the_empty_table(store: Store) -> None:
    assert Numbers.write(iter([])).digest == Numbers.write([]).digest


def test_a_part_that_does_not_fit_says_behind_which_row_it_begins(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"Numbers.id: row 1 is null; .* \(of the part behind row 3\)"):
        Numbers.write(iter([ROWS, {"id": ["a", None], "x": [1, 2]}]))
    assert list(store.digests()) == []


def test_an_error_in_making_a_part_is_not_blamed_on_the_store(store: Store) -> None:
    def parts() -> Iterator[Any]:
        yield ROWS
        raise BlockingIOError(11, "no process can be started")

    with pytest.raises(BlockingIOError, match="no process"):
        Numbers.write(parts())
    assert list(store.digests()) == []


def test_columns_are_read_alone_and_in_the_order_asked_for(store: Store) -> None:
    numbers = Numbers.write(ROWS)
    assert numbers.read(["x"]).to_pydict() == {"x": [1, None, -3]}
    assert numbers.read(["x", "id"]).column_names == ["x", "id"]


@pytest.mark.parametrize("parts", [1, 3, 10])
def test_batches_end_where_a_column_has_as_much_text_as_one_holds(
    store: Store, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(artifact, "BATCH_SIZE", 10)
    rows = [{"id": "x" * size, "x": None} for size in (4, 6, 1, 9, 10, 3, 3, 3, 3, 11)]
    step = -(-len(rows) // parts)
    written = Numbers.write(iter([rows[start : start + step] for start in range(0, len(rows), step)]))
    sizes = [batch.num_rows for batch in written.read().to_batches()]
    assert sizes == [2, 2, 1, 3, 1, 1]
    assert written.rows() == rows
    assert Numbers.write(rows) == written


def test_rows_are_taken_from_columns_with_more_text_than_one_array_holds() -> None:
    part = pa.array(["x" * 2**26], pa.string())  # 64 MiB, 33 times the same buffer
    table = pa.table({"text": pa.chunked_array([part] * 32 + [pa.array(["end" + "x" * 2**26])])})
    with pytest.raises(pa.ArrowInvalid, match="offset overflow"):
        table.take([32, 0])
    assert [text[:3] for text in take_rows(table, [32, 0]).column("text").to_pylist()] == ["end", "xxx"]
    assert take_rows(table, []).num_rows == 0


class Widened(Table):
    schema = pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("x", pa.int64()), pa.field("y", pa.int64())]
    )
    optional = ("y",)


def test_an_optional_column_may_be_left_out_and_is_null_then() -> None:
    whole = [row | {"y": None} for row in ROWS]
    columns = {"id": ["a", "b", "c"], "x": [1, None, -3]}
    for given_rows in (ROWS, columns, pa.table({"id": ["a", "b", "c"], "x": pa.array([1, None, -3])})):
        assert Widened.conform(given_rows).to_pylist() == whole
    with pytest.raises(ArtifactError, match="x"):
        Widened.conform([{"id": "a", "y": 1}])
