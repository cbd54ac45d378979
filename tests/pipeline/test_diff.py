"""Differences of tables and of weights: counted by hand."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pytest

from pipeline.artifact import ArtifactError, Folder
from pipeline.diff import compare_tables, compare_weights, read_rows, schema_changes, stored_tensors
from pipeline.store import Store, use_store
from stages.tables import Evaluation


def table(rows: list[dict[str, Any]], **types: pa.DataType) -> pa.Table:
    schema = pa.schema([("name", pa.string()), ("sample", pa.int32()), *types.items()])
    return pa.Table.from_pylist(rows, schema=schema)


def row(name: str, sample: int, **values: Any) -> dict[str, Any]:
    return {"name": name, "sample": sample, **values}


KEY = ("name", "sample")


def test_rows_are_joined_by_key_and_not_by_position() -> None:
    before = table([row("a", 0, x=1.0), row("a", 1, x=2.0), row("b", 0, x=3.0)], x=pa.float64())
    after = table([row("b", 0, x=3.5), row("c", 0, x=9.0), row("a", 0, x=1.0)], x=pa.float64())
    found = compare_tables(before, after, key=KEY)
    assert (found.shared, found.changed) == (2, 1)
    assert found.only_before == [("a", 1)]
    assert found.only_after == [("c", 0)]
    (part,) = found.columns
    assert (part.name, part.rows, part.largest) == ("x", 1, 0.5)
    (changed,) = found.first(5)
    assert (changed.key, changed.values) == (("b", 0), {"x": (3.0, 3.5)})


def test_null_and_nan_equal_themselves_and_nothing_else() -> None:
    values = [None, math.nan, 1.0, None, math.nan]
    others = [None, math.nan, None, 1.0, 1.0]
    before = table([row("a", place, x=value) for place, value in enumerate(values)], x=pa.float64())
    after = table([row("a", place, x=value) for place, value in enumerate(others)], x=pa.float64())
    found = compare_tables(before, after, key=KEY)
    assert [part.key for part in found.first(9)] == [("a", 2), ("a", 3), ("a", 4)]
    assert found.columns[0].largest is None  # none of the three has a number on both sides


def test_lists_differ_by_length_by_value_and_by_being_null() -> None:
    kind = pa.list_(pa.float32())
    lists = [[1.0, 2.0], [1.0], [], None, None, [4.0]]
    others = [[1.0, 2.5], [1.0, 1.0], [], None, [1.0], [4.0]]
    before = table([row("a", place, x=value) for place, value in enumerate(lists)], x=kind)
    after = table([row("a", place, x=value) for place, value in enumerate(others)], x=kind)
    found = compare_tables(before, after, key=KEY)
    assert [part.key[1] for part in found.first(9)] == [0, 1, 4]
    assert found.columns[0].largest == 0.5


def test_maps_and_texts_are_compared_whole() -> None:
    kinds = {"m": pa.map_(pa.string(), pa.float64()), "t": pa.string()}
    before = table([row("a", 0, m=[("p", 1.0)], t="x"), row("a", 1, m=[("p", 1.0)], t="x")], **kinds)
    after = table([row("a", 0, m=[("p", 1.0)], t="y"), row("a", 1, m=[("p", None)], t="x")], **kinds)
    found = compare_tables(before, after, key=KEY)
    assert {part.name: (part.rows, part.largest) for part in found.columns} == {"m": (1, None), "t": (1, None)}
    assert [list(part.values) for part in found.first(9)] == [["t"], ["m"]]


def test_rows_of_one_key_are_joined_in_their_order() -> None:
    before = table([row("a", 0, x=1), row("a", 0, x=2)], x=pa.int64())
    after = table([row("a", 0, x=1), row("a", 0, x=7), row("a", 0, x=8)], x=pa.int64())
    found = compare_tables(before, after, key=KEY)
    assert [part.values for part in found.first(9)] == [{"x": (2, 7)}]
    assert found.only_after == [("a", 0, 2)]


def test_without_a_key_rows_are_joined_by_their_number() -> None:
    found = compare_tables(pa.table({"x": [1, 2]}), pa.table({"x": [1, 3, 4]}), key=())
    assert ([part.key for part in found.first(9)], found.only_after) == ([(1,)], [(2,)])


def test_equal_and_empty_tables_have_no_differences() -> None:
    empty = table([], x=pa.float64())
    assert compare_tables(empty, empty, key=KEY).changed == 0
    one = table([row("a", 0, x=1.0)], x=pa.float64())
    assert list(compare_tables(one, one, key=KEY).first(3)) == []
    assert compare_tables(empty, one, key=KEY).only_after == [("a", 0)]


def test_columns_that_came_went_or_changed_type_are_named() -> None:
    before = pa.schema([pa.field("a", pa.int32(), nullable=False), ("b", pa.string())])
    after = pa.schema([pa.field("a", pa.int64(), nullable=False), ("c", pa.string())])
    assert schema_changes(before, after) == {"a": ("int32", "int64"), "b": ("string?", "-"), "c": ("-", "string?")}


def test_any_table_is_read_whatever_class_wrote_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with use_store(store):
        written = Evaluation.write(
            [{"question_id": "q", "samples": 2, "correct": 1, "majority_correct": True, "status_counts": [("ok", 1)]}]
        )
        folder = Folder.write(lambda place: (place / "note.txt").write_text("x") and None)
        broken = Folder.write(lambda place: (place / "table.arrow").write_text("no table") and None)
    rows = read_rows(store, written.digest)
    assert rows is not None
    assert rows["correct"].to_pylist() == [1]
    assert read_rows(store, folder.digest) is None
    with pytest.raises(ArtifactError, match="not a readable Arrow file"):
        read_rows(store, broken.digest)


def write_tensors(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file, written here byte by byte."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(values)]}  # type: ignore[dict-item]
        body += values
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_weights_are_apart_by_what_their_bytes_say(tmp_path: Path) -> None:
    before = {"w": ("F32", [2, 2], floats(1, 2, 3, 4)), "b": ("F32", [1], floats(5)), "old": ("F32", [1], floats(0))}
    after = {"w": ("F32", [2, 2], floats(1, 2.5, 3, 1)), "b": ("F32", [1], floats(5)), "new": ("F32", [1], floats(0))}
    found = list(
        compare_weights(
            stored_tensors(write_tensors(tmp_path / "a", before)), stored_tensors(write_tensors(tmp_path / "b", after))
        )
    )
    assert [(part.name, part.largest, part.changed, part.squares) for part in found] == [
        ("w", 3.0, 2, 9.25),
        ("b", 0.0, 0, 0.0),
    ]


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    halves = numpy.array([1.0, -2.0, 0.15625], numpy.float32).view(numpy.uint16)[1::2].tobytes()
    tensors = stored_tensors(write_tensors(tmp_path / "a", {"w": ("BF16", [3], halves)}))
    assert numpy.concatenate(list(tensors["w"].pieces())).tolist() == [1.0, -2.0, 0.15625]
    assert tensors["w"].size == 3


def test_numbers_that_are_not_finite_count_as_far_apart(tmp_path: Path) -> None:
    before = stored_tensors(write_tensors(tmp_path / "a", {"w": ("F32", [2], floats(math.nan, 1))}))
    after = stored_tensors(write_tensors(tmp_path / "b", {"w": ("F32", [2], floats(math.nan, math.nan))}))
    (part,) = compare_weights(before, after)
    assert (part.changed, part.largest) == (1, math.inf)


def test_weights_that_numpy_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    tensors = stored_tensors(write_tensors(tmp_path / "a", {"w": ("F8_E4M3", [1], b"\0")}))
    with pytest.raises(ValueError, match="F8_E4M3 cannot be compared"):
        list(tensors["w"].pieces())
