"""What is read is what the file says: exact numbers, nested columns, repeated rows, cells of any size, no pipes."""

from __future__ import annotations

import csv
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.data import DataError, QuestionFileConfig, SolutionFileConfig, read_questions, read_solutions

STRUCT = pa.struct([("ground_truth", pa.float32())])


def config(path: Path, **values: Any) -> QuestionFileConfig:
    return QuestionFileConfig.parse({"path": str(path), **values})


def answers(path: Path, **values: Any) -> list[str]:
    return [row["answer"] for row in read_questions(config(path, **values)).rows()]


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def parquet(path: Path, **columns: pa.Array) -> Path:
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"question": [f"q{number}" for number in range(count)], **columns}), path)
    return path


# ------------------------------------------------------------------------------------------------ exact numbers


@pytest.mark.claim("numbers changed on the way in")
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (pa.array([132.04], pa.float32()), "132.04"),
        (pa.array([132.04], pa.float64()), "132.04"),
        (pa.array([132.04], pa.float16()), "132"),  # the nearest that there is, to which 132 reads back too
        (pa.array([0.1], pa.float16()), "0.1"),
        (pa.array([1e-7], pa.float32()), "0.0000001"),
        (pa.array([-0.0]), "0"),
        (pa.array([1e15]), "1000000000000000"),
        (pa.array([Decimal("132.040")], pa.decimal128(10, 3)), "132.04"),
        (pa.array([Decimal("-7.00")], pa.decimal256(60, 2)), "-7"),
        (pa.array([Decimal("12345678901234567890.1")], pa.decimal128(38, 1)), "12345678901234567890.1"),
        (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
        (pa.array([-(2**63)], pa.int64()), "-9223372036854775808"),
        (pa.array([7], pa.int8()), "7"),
        (pa.array(["007"]), "007"),
        (pa.array(["1.50"], pa.large_string()), "1.50"),
        (pa.array([132.04], pa.float32()).dictionary_encode(), "132.04"),
    ],
)
def test_every_type_of_number_gives_its_shortest_decimal(store: Store, tmp_path: Path, answer: Any, text: str) -> None:
    assert answers(parquet(tmp_path / "q.parquet", answer=answer)) == [text]


@pytest.mark.parametrize(
    "answer",
    [
        pa.array([{"ground_truth": 132.04}], STRUCT),
        pa.array([[{"ground_truth": 132.04}]], pa.list_(STRUCT)),
        pa.array([[("ground_truth", 132.04)]], pa.map_(pa.string(), pa.float32())),
    ],
    ids=["struct", "list", "map"],
)
def test_numbers_inside_nested_columns_are_exact_too(store: Store, tmp_path: Path, answer: pa.Array) -> None:
    path = parquet(tmp_path / "q.parquet", reward=answer)
    place = "reward.0.ground_truth" if pa.types.is_list(answer.type) else "reward.ground_truth"
    assert answers(path, columns={"answer": place}) == ["132.04"]


def test_a_folder_of_datasets_keeps_numbers_exact(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = pa.table({"question": ["q0", "q1"], "answer": pa.array([132.04, 0.1], pa.float32())})
    datasets.Dataset(table).select([1, 0]).save_to_disk(tmp_path / "saved")
    assert answers(tmp_path / "saved") == ["0.1", "132.04"]


@pytest.mark.claim("numbers changed on the way in")
@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("9007199254740993", "9007199254740993"),
        ("3.0", "3"),
        ("1.50", "1.5"),
        ("1e3", "1000"),
        ("12345678901234567890.123456789", "12345678901234567890.123456789"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("0e999999999999999999999", "0"),
        ("1" * 400, "1" * 400),
    ],
)
def test_numbers_of_json_are_the_digits_of_the_file(store: Store, tmp_path: Path, number: str, text: str) -> None:
    assert answers(lines(tmp_path / "q.jsonl", f'{{"question": "q", "answer": {number}}}')) == [text]


@pytest.mark.claim("inexact gold answers")
@pytest.mark.parametrize(
    "number",
    ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "1e99999999999999999999", "1" * 5000, "true"],
)
@pytest.mark.parametrize("column", ["question", "answer"])
def test_numbers_without_an_exact_decimal_are_refused_by_row(
    store: Store, tmp_path: Path, number: str, column: str
) -> None:
    values = {"question": '"q1"', "answer": '"4"', column: number}
    bad = "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"
    path = lines(tmp_path / "q.jsonl", '{"question": "q0", "answer": 1}', bad)
    with pytest.raises(DataError, match=f"line 2: column '{column}'"):
        read_questions(config(path))


@pytest.mark.claim("inexact gold answers")
@pytest.mark.parametrize(
    "answer",
    [
        pa.array([1.0, float("nan")]),
        pa.array([1.0, float("-inf")], pa.float32()),
        pa.array([1.0, float("inf")], pa.float16()),
        pa.array([1.0, 2.0**53]),  # 2^53 + 1 reads as it
        pa.array([1.0, 16777216.0], pa.float32()),
        pa.array([1.0, 2048.0], pa.float16()),
        pa.array([True, False]),
        pa.array([b"1", b"2"]),
        pa.array([{"x": 1}, {"x": 2}]),
    ],
    ids=lambda array: str(array.type),
)
def test_columns_that_hold_no_exact_number_are_refused_by_row(store: Store, tmp_path: Path, answer: pa.Array) -> None:
    first = 1 if pa.types.is_floating(answer.type) else 0
    with pytest.raises(DataError, match=f"row {first}: column 'answer'"):
        read_questions(config(parquet(tmp_path / "q.parquet", answer=answer)))


def test_columns_that_are_not_read_may_hold_anything(store: Store, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", '{"question": "q", "answer": 1, "x": NaN, "y": 1e999, "z": ' + "9" * 5000 + "}")
    assert answers(path) == ["1"]
    table = parquet(tmp_path / "q.parquet", answer=pa.array([2]), x=pa.array([1], pa.time64("ns")))
    assert answers(table) == ["2"]


def test_rows_of_parquet_are_numbered_through_all_of_a_file(store: Store, tmp_path: Path) -> None:
    count = 2_500  # two batches and more; the last row is at fault
    answer = pa.array([*range(count - 1), None], pa.int32())
    path = parquet(tmp_path / "q.parquet", answer=answer)
    with pytest.raises(DataError, match=rf"row {count - 1}: question without an answer"):
        read_questions(config(path))
    questions = read_questions(config(path, limit=count - 1)).read()
    assert questions.column("answer").to_pylist() == [str(number) for number in range(count - 1)]


@pytest.mark.parametrize("text", ["NaN", "nan", "-inf", "Infinity"])
def test_a_csv_cell_that_names_no_number_is_refused_by_row(store: Store, tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="line 3: column 'answer'"):
        read_questions(config(lines(tmp_path / "q.csv", "question,answer", "q0,1", f"q1,{text}")))
    assert answers(lines(tmp_path / "q.csv", "question,answer,x", f"q0,1,{text}")) == ["1"]


def test_a_name_that_an_object_has_twice_is_refused_by_row(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: the name 'answer' is there twice"):
        read_questions(config(lines(tmp_path / "q.jsonl", '{"question": "q", "answer": 1, "answer": 2}')))


# ------------------------------------------------------------------------------------------------ nested columns

DAPO = {"question": "prompt.0.content", "answer": "reward_model.ground_truth"}
DAPO_ROW = {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4", "style": "rule"}}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_path_leads_into_nested_columns(store: Store, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"q.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([DAPO_ROW]), path)
    else:
        lines(path, json.dumps(DAPO_ROW))
    for place in ("prompt.0.content", "prompt.-1.content"):
        (row,) = read_questions(config(path, columns={**DAPO, "question": place})).rows()
        assert (row["question"], row["answer"]) == ("2+2?", "4")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"a.b": "literal", "a": {"b": "nested"}}, "literal"),
        ({"a": {"b": "nested"}}, "nested"),
        ({"a": {"x": 1}, "a.b": "literal"}, "literal"),
    ],
)
def test_a_column_with_the_very_name_wins_over_a_path(
    store: Store, tmp_path: Path, row: dict[str, Any], answer: str
) -> None:
    path = lines(tmp_path / "q.jsonl", json.dumps({"question": "q", **row}))
    assert answers(path, columns={"answer": "a.b"}) == [answer]


def test_names_with_dots_are_found_at_every_depth(store: Store, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", json.dumps({"question": "q", "a": {"b": 1, "b.c": {"d": "deep"}}}))
    assert answers(path, columns={"answer": "a.b.c.d"}) == ["deep"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("prompt.0.contents", r"found in prompt\.0 \['content', 'role'\]; did you mean 'prompt\.0\.content'\?"),
        ("prompt.1.content", r"found in prompt \['0'\]"),
        ("promt.0.content", r"found columns \['prompt', 'reward_model'\]; did you mean 'prompt\.0\.content'\?"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_is_there(store: Store, tmp_path: Path, place: str, message: str) -> None:
    path = lines(tmp_path / "q.jsonl", json.dumps(DAPO_ROW))
    with pytest.raises(DataError, match=message):
        read_questions(config(path, columns={**DAPO, "question": place}))


def test_a_row_whose_path_ends_early_is_named(store: Store, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", json.dumps(DAPO_ROW), json.dumps({**DAPO_ROW, "prompt": []}))
    with pytest.raises(DataError, match=r"line 2: no value: column 'prompt\.0\.content' is empty"):
        read_questions(config(path, columns=DAPO))


@pytest.mark.parametrize("columns", [{"question": []}, {"question": ""}, {"question": [""]}, {"answer": ""}])
def test_no_column_at_all_is_none_to_read_a_question_from(columns: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        QuestionFileConfig.parse({"path": "q.jsonl", "columns": columns})


# ------------------------------------------------------------------------------------------------ repeated rows

REPEATED = [("q0", "1"), ("q1", "2"), ("q0", "1"), ("q0", "1")]


def rows_file(folder: Path, rows: list[tuple[str, str]], ids: str = "") -> Path:
    named = [{"question": q, "answer": a} | ({"id": ids[n]} if ids else {}) for n, (q, a) in enumerate(rows)]
    return lines(folder / "q.jsonl", *map(json.dumps, named))


@pytest.mark.claim("repeated rows")
@pytest.mark.parametrize(
    ("policy", "ids", "kept", "repeats"),
    [
        ("first", "", [("q0", "1"), ("q1", "2")], 2),
        ("first", "abaa", [("q0", "1"), ("q1", "2")], 2),
        ("first", "abcd", REPEATED, 0),
        ("number", "", REPEATED, 2),
        ("number", "abaa", REPEATED, 2),
    ],
)
def test_repeated_rows_go_or_are_numbered_and_counted(
    store: Store, tmp_path: Path, policy: str, ids: str, kept: list[tuple[str, str]], repeats: int
) -> None:
    questions = read_questions(config(rows_file(tmp_path, REPEATED, ids), duplicates=policy))
    rows = questions.rows()
    assert [(row["question"], row["answer"]) for row in rows] == kept
    assert questions.metrics == {"data/rows": 4, "data/repeats": repeats}
    assert len({row["question_id"] for row in rows}) == len(rows)
    if policy == "number":
        first = rows[0]["question_id"]
        assert [row["question_id"] for row in rows[2:]] == [f"{first}#2", f"{first}#3"]


@pytest.mark.claim("repeated rows")
@pytest.mark.parametrize(
    ("policy", "rows", "ids", "message"),
    [
        ("refuse", REPEATED, "", "line 3: the question 'q0' was already used at .*line 1"),
        ("refuse", REPEATED, "abcb", "line 4: the id 'b' was already used at .*line 2"),
        ("first", [("q0", "1"), ("q0", "2")], "", "line 2: repeats the question of .*line 1 with another answer"),
        ("first", [("q0", "1"), ("q1", "1")], "aa", "line 2: repeats the id of .*line 1 with another question"),
    ],
)
def test_repeats_that_contradict_or_are_not_expected_are_refused(
    store: Store, tmp_path: Path, policy: str, rows: list[tuple[str, str]], ids: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(config(rows_file(tmp_path, rows, ids), duplicates=policy))


def test_a_number_that_another_row_has_for_its_id_is_refused(store: Store, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl", *(json.dumps({"question": f"{i}", "answer": "1", "id": i}) for i in ("a", "a#2", "a"))
    )
    with pytest.raises(DataError, match="line 3: the id 'a#2' was already used"):
        read_questions(config(path, duplicates="number"))


def test_a_policy_of_repeats_that_solutions_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match="equal questions are one"):
        SolutionFileConfig.parse({"source": {"path": "x.jsonl", "duplicates": "first"}})


# ------------------------------------------------------------------------------------------------ CSV, solutions, files


@pytest.mark.parametrize("column", ["question", "notes"])
def test_a_csv_cell_may_be_of_any_size_whoever_reads_it(store: Store, tmp_path: Path, column: str) -> None:
    before = csv.field_size_limit(131_072)
    try:
        row = {"question": "q", "answer": "1", "notes": "n"} | {column: "x" * 300_000}
        path = lines(tmp_path / "q.csv", "question,answer,notes", ",".join(row.values()))
        assert len(read_questions(config(path)).rows()[0]["question"]) == len(row["question"])
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('question,answer\n"a\nb\nc",1\nd,\n', 5),
        ('question,answer\na,1\n"b\nc",\n', 3),
        ('question,answer\n\n\n"b\nc",1,2\n', 4),
        ('question,answer\n"a\nb",1\n"c"d,2\n', 4),
        ('question,answer\n"a\nb",1\nc,\udcff\n', 4),
    ],
)
def test_the_line_named_is_the_one_that_a_row_of_csv_begins_on(
    store: Store, tmp_path: Path, text: str, line: int
) -> None:
    (tmp_path / "q.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"q\.csv: line {line}\b"):
        read_questions(config(tmp_path / "q.csv"))


def test_solutions_are_read_by_path_and_exactly(store: Store, tmp_path: Path) -> None:
    row = {**DAPO_ROW, "meta": {"text": "two and two", "ok": 1.0}, "reward_model": {"ground_truth": 4.10}}
    path = lines(tmp_path / "s.jsonl", json.dumps(row))
    source = {"path": str(path), "columns": DAPO}
    given = SolutionFileConfig.parse({"source": source, "solution": "meta.text", "label": "meta.ok"})
    (found,) = read_solutions(given).rows()
    assert (found["answer"], found["solution"], found["label"]) == ("4.1", "two and two", True)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(store: Store, tmp_path: Path, inside: bool) -> None:
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "q.jsonl")
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        read_questions(config(tmp_path / "data" if inside else tmp_path / "data" / "q.jsonl"))
