"""Question files: columns, answers, and errors that name the row at fault."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.data import DataError, QuestionFileConfig, demonstrations_from_solutions, read_questions
from stages.data.files import extract_answer
from stages.tables import identify

ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "2+2?", "answer": "4", "solution": "two and two"},
    {"id": "b", "question": "2*3?", "answer": "6", "solution": "2*3=<<2*3=6>>6"},
]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(path: str, **values: Any) -> QuestionFileConfig:
    return QuestionFileConfig.parse({"path": path, **values})


def test_jsonl_rows_become_questions(store: Store, tmp_path: Path) -> None:
    rows = read_questions(config(write_jsonl(tmp_path / "q.jsonl", ROWS))).rows()
    assert rows[1] == {"question_id": "b", "question": "2*3?", "answer": "6", "solution": "2*3=<<2*3=6>>6"}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_every_kind_of_file_gives_one_and_the_same_artifact(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    write_jsonl(tmp_path / "plain" / "train.jsonl", ROWS)
    found = {
        read_questions(config(write_jsonl(tmp_path / "q.jsonl", ROWS))),
        read_questions(config(str(tmp_path / "q.parquet"))),
        read_questions(config(write_csv(tmp_path / "q.csv", ROWS))),
        read_questions(config(write_csv(tmp_path / "q.tsv", ROWS))),
        read_questions(config(str(tmp_path / "saved"), split="train")),
        read_questions(config(str(tmp_path / "plain"))),
    }
    assert len(found) == 1


def test_cells_of_csv_are_text_with_commas_quotes_and_newlines(store: Store, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(
        b'\xef\xbb\xbfprompt,gold\r\n"Add 1,000 and ""7"":\n\xe4\xb8\xad",01.50\r\n\r\nplain,2\r\n'  # as Excel saves it
    )
    rows = read_questions(config(str(tmp_path / "q.csv"), columns={"question": "prompt", "answer": "gold"})).rows()
    assert [(row["question"], row["answer"]) for row in rows] == [('Add 1,000 and "7":\n中', "01.50"), ("plain", "2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b"question,answer\n1,2\n1 and 2,3,4\n", r"line 3: expected 2 cells \(question, answer\), found 3"),
        ("q.csv", b"question,answer\n1,\n", r"line 2: question without an answer: column 'answer' is empty"),
        ("q.csv", b'question,answer\n1,2\n"1,2\n', r"line 3 is not CSV in UTF-8: unexpected end of data"),
        ("q.csv", b"question,answer\n\xff,2\n", r"line 2 is not CSV in UTF-8"),
        ("q.csv", b"question,answer,answer\n1,2,3\n", r"line 1: a column is there twice"),
        ("q.csv", b"question;answer\n1;2\n", r"no column 'question'; found columns \['question;answer'\]"),
        ("q.csv", b"", "no questions: the set is empty"),
        ("q.jsonl", b'{"question": "1", "answer": 2}\n\n{"id": "b", \n', "line 3 is not JSON"),
        ("q.parquet", b"PAR1 not really", "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    store: Store, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: {message}"):
        read_questions(config(str(tmp_path / name)))


def test_a_script_of_a_data_set_never_runs(store: Store, tmp_path: Path) -> None:
    """The way a data set once brought its own loader: a module of the folder's name."""
    pytest.importorskip("datasets")
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(DataError, match="scripted: `datasets` cannot read this folder"):
        read_questions(config(str(folder)))
    write_jsonl(folder / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="Dataset scripts are no longer supported"):
        read_questions(config(str(folder)))
    assert not (tmp_path / "ran").exists()


def test_the_cache_key_is_the_content_not_the_path(tmp_path: Path) -> None:
    one, copy = (config(write_jsonl(tmp_path / name, ROWS)) for name in ("one.jsonl", "copy.jsonl"))
    before = one.key()
    assert before == copy.key()
    write_jsonl(tmp_path / "one.jsonl", [*ROWS, {"id": "c", "question": "1?", "answer": "1", "solution": ""}])
    assert one.key() != before


def test_columns_are_mapped_and_texts_joined(store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "svamp.jsonl", [{"body": "Dan had $3.", "q": "How much?", "gold": 3.0}])
    mapped = config(path, columns={"question": ["body", "q"], "answer": "gold"})
    assert read_questions(mapped).rows() == [
        {
            "question_id": identify("Dan had $3. How much?"),
            "question": "Dan had $3. How much?",
            "answer": "3",
            "solution": None,
        }
    ]


def test_the_answer_is_taken_from_the_solution_where_no_column_holds_it(store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "48/2?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}])
    columns = {"answer": None, "solution": "answer"}
    questions = read_questions(config(path, columns=columns, remove_calculator_marks=True))
    (row,) = questions.rows()
    assert (row["answer"], row["solution"]) == ("24", "48/2 = 24\n#### 24")
    boxed = demonstrations_from_solutions(questions, r"The answer is \boxed{{answer}}.").rows()
    assert boxed[0]["completion"] == "48/2 = 24\n" + r"The answer is \boxed{24}."


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("x\n#### 17", "17"),
        ("#### 1\n#### 1,234 \n", "1,234"),
        ("no mark", None),
        ("####", None),
        ("#### 5\nmore", "5"),
    ],
)
def test_the_answer_is_behind_the_last_marker(solution: str, answer: str | None) -> None:
    assert extract_answer(solution) == answer


def test_demonstrations_end_in_one_answer_line(store: Store, tmp_path: Path) -> None:
    demonstrations = demonstrations_from_solutions(read_questions(config(write_jsonl(tmp_path / "q.jsonl", ROWS))))
    assert [row["completion"] for row in demonstrations.rows()] == ["two and two\n#### 4", "2*3=<<2*3=6>>6\n#### 6"]


def test_a_question_without_a_solution_cannot_be_demonstrated(store: Store, tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "solution": None}]
    questions = read_questions(config(write_jsonl(tmp_path / "q.jsonl", rows)))
    with pytest.raises(DataError, match=r"row 1 \(question b\) has no solution"):
        demonstrations_from_solutions(questions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {**ROWS[1], "answer": None}], "line 2: question without an answer: column 'answer' is empty"),
        ([ROWS[0], {**ROWS[1], "answer": " "}], "line 2: question without an answer: column 'answer' is empty"),
        ([ROWS[0], {"id": "b", "question": "2*3?"}], "line 2: question without an answer: column 'answer' is empty"),
        ([ROWS[0], {**ROWS[1], "answer": ["6"]}], "line 2: column 'answer': expected text or a number, found list"),
        ([ROWS[0], {**ROWS[1], "question": ""}], "line 2: no value: column 'question' is empty"),
        ([ROWS[0], {**ROWS[1], "question": "\ud83d"}], "line 2: column 'question' holds half of a surrogate pair"),
        ([ROWS[0], [1]], "line 2: expected a JSON object, found list"),
        ([], "no questions: the set is empty"),
        ([{"id": "a", "questions": "2+2?", "answer": "4"}], "did you mean 'questions'?"),
    ],
)
def test_a_bad_row_is_named(store: Store, tmp_path: Path, rows: list[Any], message: str) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_questions(config(str(tmp_path / "q.jsonl")))
    assert "q.jsonl" in str(caught.value)


def test_an_id_column_that_was_asked_for_must_exist(store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "2+2?", "answer": "4"}])
    with pytest.raises(DataError, match="no column 'number'"):
        read_questions(config(path, columns={"id": "number"}))


def test_an_overridden_configuration_asks_for_no_more_columns(store: Store, tmp_path: Path) -> None:
    given = config(write_jsonl(tmp_path / "q.jsonl", [{"question": "2+2?", "answer": "4"}]))
    for same in (given.override({"limit": 1}), QuestionFileConfig.from_yaml(given.to_yaml())):
        assert read_questions(same).rows()[0]["solution"] is None


def test_a_missing_file_is_an_error_with_the_nearest_name(store: Store, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"train\.json: no such file or folder; did you mean 'train\.jsonl'\?"):
        read_questions(config(str(tmp_path / "train.json")))


def test_a_split_that_a_folder_lacks_is_an_error_that_lists_them(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"expected split to be one of \['test', 'train'\], found 'tset'"):
        read_questions(config(str(tmp_path / "saved"), split="tset"))


def test_a_hub_data_set_needs_the_commit_it_is_read_at(store: Store) -> None:
    with pytest.raises(DataError, match="needs `revision`"):
        read_questions(config("openai/gsm8k", format="hub"))
    with pytest.raises(ConfigError, match="revision"):
        config("openai/gsm8k", format="hub", revision="main")


@pytest.mark.claim("4.2 questions")
@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_all_of_gsm8k_is_read(store: Store, data_dir: Path, name: str, count: int) -> None:
    questions = read_questions(config(str(data_dir / "gsm8k" / f"{name}.jsonl"), remove_calculator_marks=True))
    rows = questions.rows()
    assert len(rows) == count
    assert not any("<<" in row["solution"] for row in rows)
    assert rows[0]["question_id"] == name.replace("_", "-") + "-0"
    first = demonstrations_from_solutions(questions).rows()[0]["completion"]
    assert first.endswith(f"\n#### {rows[0]['answer']}")


def test_chinese_and_svamp_sets_are_read(store: Store, data_dir: Path) -> None:
    cmath = read_questions(config(str(data_dir / "deepseek_math" / "cmath_test.jsonl"))).rows()
    svamp = read_questions(
        config(str(data_dir / "svamp" / "svamp.jsonl"), columns={"question": ["body", "question"]})
    ).rows()
    assert (len(cmath), cmath[0]["answer"]) == (1098, "18")
    assert (len(svamp), svamp[0]["answer"]) == (1000, "51")
