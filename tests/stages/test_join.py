"""One join for all stages: compared with a plain dict join, and what it refuses by key."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.join import (
    JoinError,
    Ragged,
    align,
    group_rows,
    key_at,
    per_token,
    require_unique,
    same_keys,
    written_by_policy,
    written_lengths,
)
from stages.tables import Rollouts
from tests.stages.rows import rollout_row

Row = tuple[str, int, Any]

# Ids that differ in a space, a zero byte, a composed accent, or where one part of the key ends and the next begins.
IDS = st.sampled_from(["", "a", "a ", "a1", "a\0", "A", "é", "é", "1", "11", "q-1", "q-10"])
SAMPLES = st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 12)
VALUES = st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=3)


def table(rows: list[Row], chunk: int | None = None) -> pa.Table:
    """Rows of (question_id, sample, value); in chunks of `chunk` rows."""
    names, kinds = ("question_id", "sample", "value"), (pa.string(), pa.int32(), pa.list_(pa.float32()))
    whole = pa.table(
        {
            name: pa.array([row[i] for row in rows], kind)
            for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
        }
    )
    if chunk is None:
        return whole
    return pa.concat_tables([whole.slice(0, 0), *(whole.slice(start, chunk) for start in range(0, len(rows), chunk))])


def keyed(*keys: tuple[str, int]) -> pa.Table:
    return table([(*key, [float(place)]) for place, key in enumerate(keys)])


@settings(max_examples=50)
@given(st.dictionaries(st.tuples(IDS, SAMPLES), VALUES, max_size=8), st.integers(0, 99), st.integers(1, 4))
def test_rows_come_as_a_dict_would_give_them(values: dict[tuple[str, int], Any], seed: int, chunk: int) -> None:
    wanted, found = list(values), list(values)
    draw = random.Random(seed)
    draw.shuffle(wanted)
    draw.shuffle(found)
    joined = align(
        table([(*key, None) for key in wanted], chunk), table([(*key, values[key]) for key in found], chunk), "rewards"
    )
    assert joined["value"].to_pylist() == [values[key] for key in wanted]
    ragged = Ragged.of(joined["value"])
    assert [None if null else row.tolist() for row, null in zip(ragged, ragged.null, strict=True)] == [
        values[key] for key in wanted
    ]
    assert [len(values[wanted[row]]) for row in ragged.row_of_value] == ragged.lengths[ragged.row_of_value].tolist()


@settings(max_examples=50)
@given(st.sets(st.tuples(IDS, SAMPLES), max_size=8), st.sets(st.tuples(IDS, SAMPLES), max_size=8))
def test_what_is_missing_or_extra_is_left_out_only_where_allowed(
    wanted: set[tuple[str, int]], found: set[tuple[str, int]]
) -> None:
    left, right = [(*key, None) for key in wanted], [(*key, [1.0]) for key in found]
    joined = align(table(left), table(right), "rewards", extra=True, missing=True)
    assert [value is not None for value in joined["value"].to_pylist()] == [key in found for key in wanted]
    for allowed, faults in (({"extra": True}, wanted - found), ({"missing": True}, found - wanted)):
        if faults:
            with pytest.raises(JoinError) as refused:
                align(table(left), table(right), "rewards", **allowed)
            assert {refused.value.missing, refused.value.extra} - {None} <= faults
        else:
            align(table(left), table(right), "rewards", **allowed)


@pytest.mark.parametrize(
    ("wanted", "found", "named"),
    [
        ([("a", 0), ("a", 1), ("b", 0)], [("a", 0)], {"missing": ("a", 1)}),
        ([("a", 0)], [("b", 1), ("a", 0)], {"extra": ("b", 1)}),
        ([("a", 0), ("b", 0)], [("a", 1), ("b", 0)], {"missing": ("a", 0), "extra": ("a", 1)}),
        ([("a", 0), ("b", 0)], [("b", 0), ("a", 0), ("a", 0)], {"repeated": ("a", 0)}),
        ([("a", 0)], [], {"missing": ("a", 0)}),
        ([], [("a", 0)], {"extra": ("a", 0)}),
    ],
)
def test_the_first_row_at_fault_is_named(wanted: list[Any], found: list[Any], named: dict[str, Any]) -> None:
    with pytest.raises(JoinError) as refused:
        align(keyed(*wanted), keyed(*found), "rewards")
    error = refused.value
    assert error.table == "rewards"
    assert {"missing": error.missing, "extra": error.extra, "repeated": error.repeated} == {
        "missing": None,
        "extra": None,
        "repeated": None,
    } | named
    assert all(str(key) in str(error) for key in named.values())


def test_the_text_says_what_was_expected_what_was_found_and_what_to_do() -> None:
    with pytest.raises(JoinError) as refused:
        align(keyed(("a", 0), ("a", 1)), keyed(("a", 0), ("z", 3)), "rewards")
    assert str(refused.value) == (
        "rewards do not match outputs: expected one row for each (question_id, sample), found 1 of 2 outputs without a row, "
        "first ('a', 1) and 1 of 2 rows without outputs, first ('z', 3); join tables that were made from the same outputs"
    )


def test_a_key_that_is_wanted_twice_is_refused_unless_rows_may_share_one() -> None:
    twice, once = keyed(("a", 0), ("a", 0)), keyed(("a", 0))
    with pytest.raises(JoinError) as refused:
        align(twice, once, "rewards")
    assert (refused.value.table, refused.value.repeated) == ("outputs", ("a", 0))
    assert align(twice, once, "rewards", several=True)["value"].to_pylist() == [[0.0], [0.0]]
    with pytest.raises(JoinError):
        require_unique(twice, "outputs")
    require_unique(keyed(("a", 0), ("a", 1), ("b", 0)), "outputs")


def test_outputs_are_joined_with_their_question() -> None:
    questions = pa.table({"question_id": ["b", "a"], "answer": ["2", "1"]})
    outputs = keyed(("a", 0), ("b", 0), ("a", 1))
    joined = align(outputs, questions, "questions", by=["question_id"], several=True)
    assert joined["answer"].to_pylist() == ["1", "2", "1"]
    with pytest.raises(JoinError) as refused:
        align(keyed(("c", 0)), questions, "questions", by=["question_id"], several=True, extra=True)
    assert refused.value.missing == "c"


def test_a_null_in_a_key_is_refused_by_column_and_row() -> None:
    with pytest.raises(JoinError, match=r"sample.*row 1"):
        align(keyed(("a", 0)), keyed(("a", 0), ("a", None)), "rewards")  # type: ignore[arg-type]


def test_empty_tables_join_to_an_empty_one() -> None:
    empty = keyed()
    no_chunks = pa.table(
        {name: pa.chunked_array([], column.type) for name, column in zip(empty.column_names, empty, strict=True)}
    )
    for one in (empty, no_chunks):
        assert align(one, no_chunks, "rewards").num_rows == 0
        ragged = Ragged.of(one["value"])
        assert (len(ragged), len(ragged.values), ragged.offsets.tolist()) == (0, 0, [0])
    assert group_rows(no_chunks["question_id"])[0] == []


def test_rows_in_order_are_not_copied() -> None:
    found = keyed(("a", 0), ("a", 1))
    assert align(keyed(("a", 0), ("a", 1)), found, "rewards") is found
    assert same_keys(found, keyed(("a", 0), ("a", 1)))
    assert not same_keys(found, keyed(("a", 1), ("a", 0)))


def test_groups_come_in_the_order_of_their_first_row() -> None:
    names, group_N = group_rows(
        table([("b", 0, None), ("a", 0, None), ("b", 1, None), ("c", 0, None)], 2)["question_id"]
    )
    assert (names, group_N.tolist()) == (["b", "a", "c"], [0, 1, 0, 2])


def test_a_slice_of_a_column_is_as_long_as_the_slice() -> None:
    column = table([("a", 0, [1.0, 2.0]), ("a", 1, []), ("a", 2, None), ("a", 3, [3.0])])["value"]
    ragged = Ragged.of(column.slice(1, 3))
    assert (ragged.values.tolist(), ragged.offsets.tolist(), ragged.null.tolist()) == (
        [3.0],
        [0, 0, 0, 1],
        [False, True, False],
    )


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([[1.0], [1.0, 2.0, 3.0]], "expected 2 .*, found 3"),
        ([[1.0], [0.0, float("nan")]], "found nan at token 1"),
        ([[1.0], [float("-inf"), 0.0]], "found -inf at token 0"),
        ([[1.0], [0.0, None]], "found nan at token 1"),
        ([[1.0], None], "has no advantages"),
    ],
)
def test_numbers_of_tokens_that_do_not_fit_are_refused_by_row_and_token(rows: list[Any], fault: str) -> None:
    given = table([("a", place, values) for place, values in enumerate(rows)])
    with pytest.raises(ValueError, match=rf"output \('a', 1\).*{fault}"):
        per_token(given, "value", np.array([1, 2]), "advantages")


def test_a_masked_row_has_no_numbers_where_rows_may_be_masked() -> None:
    given = table([("a", 0, None), ("a", 1, [0.5, 1.5])])
    assert per_token(given, "value", np.array([3, 2]), "advantages", masked=True).values.tolist() == [0.5, 1.5]
    assert key_at(given, 1) == ("a", 1)


def test_many_rows_are_joined_without_a_python_object_each() -> None:
    rows = 10**5
    ids = pa.array(np.arange(rows) // 4).cast(pa.string())
    whole = pa.table(
        {
            "question_id": ids,
            "sample": pa.array(np.arange(rows) % 4, pa.int32()),
            "value": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1), pa.int32()), pa.array(np.ones(rows, np.float32))
            ),
        }
    )
    shuffled = whole.take(np.random.default_rng(0).permutation(rows))
    tracemalloc.start()
    try:
        joined = align(whole, shuffled, "rewards")
        ragged = Ragged.of(joined["value"])
        blocks = sum(statistic.count for statistic in tracemalloc.take_snapshot().statistics("filename"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert same_keys(joined, whole)
    assert len(ragged) == rows
    # A string, an int and a tuple for each row would be millions of blocks, of 150 bytes a row and more.
    assert blocks < 10_000
    assert peak < 120 * rows


def _dialogues(turns: list[list[tuple[int, int]] | None], lengths: list[int]) -> pa.Table:
    spans = [None if row is None else [{"start": start, "end": end} for start, end in row] for row in turns]
    return pa.table(
        {
            "question_id": ["q"] * len(turns),
            "sample": pa.array(range(len(turns)), pa.int32()),
            "output_ids": pa.array([[7] * length for length in lengths], pa.list_(pa.int32())),
            "turns": pa.array(spans, Rollouts.schema.field("turns").type),
        }
    )


def test_the_policy_wrote_what_lies_within_its_turns_or_all_without_any() -> None:
    table = _dialogues([[(0, 2), (3, 4)], None, [(1, 3)], [(0, 2), (2, 3)]], [5, 2, 3, 4])
    written = [[1, 1, 0, 1, 0], [1, 1], [0, 1, 1], [1, 1, 1, 0]]
    assert written_by_policy(table).tolist() == [bool(token) for row in written for token in row]
    assert written_by_policy(table.slice(1, 2)).tolist() == [True, True, False, True, True]
    assert written_by_policy(_dialogues([None, None], [1, 2])).tolist() == [True] * 3


@pytest.mark.parametrize("turns", [[(0, 3), (2, 4)], [(2, 2)], [(0, 6)], [(3, 4), (0, 1)], [(-1, 2)]])
def test_turns_that_are_no_parts_of_an_output_are_refused_by_row(turns: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"output \('q', 1\)"):
        written_by_policy(_dialogues([[(0, 1)], turns], [5, 5]))


def test_lengths_are_of_what_the_policy_wrote() -> None:
    turns = [None, [{"start": 0, "end": 2}, {"start": 3, "end": 4}], None, [{"start": 0, "end": 1}]]
    rows = [rollout_row("q", at, range(ids), turns=turns[at]) for at, ids in enumerate([3, 5, 0, 4])]
    table = Rollouts.conform(rows)
    assert written_lengths(table).tolist() == [3, 3, 0, 1]
    assert written_lengths(table.slice(1, 2)).tolist() == [3, 0]
