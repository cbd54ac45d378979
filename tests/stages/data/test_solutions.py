"""Solutions of others: both forms of a file, the split by question, and the same as outputs of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.data import (
    DataError,
    SolutionFileConfig,
    demonstrations_of,
    questions_of,
    read_solutions,
    solution_outputs,
    take_solutions,
)
from stages.models import load_tokenizer
from stages.sft import PolicyConfig, create_policy
from stages.tables import Solutions, identify, is_held_out
from stages.text import PromptConfig

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
NESTED: list[dict[str, Any]] = [
    {
        "question": "2+2?",
        "gold": "so 4\nA: 4",
        "ann": {"text": "2+2=<<2+2=4>>4\nA: 4", "good": True},
        "bob": {"text": "A: 5", "good": False},
    },
    {"question": "2*3?", "gold": "A: 6", "ann": {"text": "A: 6", "good": 1}, "bob": {"text": "", "good": 0}},
]
FLAT: list[dict[str, Any]] = [
    {"question": "2+2?", "answer": 4, "solution": "A: 4", "who": "ann", "ok": True},
    {"question": "2*3?", "answer": 6, "solution": "A: 5", "who": "bob", "ok": False},
    {"question": "2+2?", "answer": 4, "solution": "A: 3", "who": None, "ok": 0},
]


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "solutions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def nested(path: str, **changes: Any) -> SolutionFileConfig:
    source = {
        "path": path,
        "columns": {"answer": None, "solution": "gold"},
        "answer_marker": "A:",
        "remove_calculator_marks": True,
    }
    named = {"authors": ["ann", "bob"], "solution": "text", "label": "good"}
    return SolutionFileConfig.parse({"source": source, **named, **changes})


def flat(path: str, **changes: Any) -> SolutionFileConfig:
    return SolutionFileConfig.parse({"source": {"path": path}, "label": "ok", "author": "who", **changes})


def cells(solutions: Solutions, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in columns) for row in solutions.rows()]


def test_a_nested_row_is_one_solution_for_each_author_who_wrote_one(store: Store, tmp_path: Path) -> None:
    found = read_solutions(nested(written(tmp_path, NESTED)))
    assert cells(found, "question_id", "sample", "answer", "solution", "author", "label") == [
        (identify("2+2?"), 0, "4", "2+2=4\nA: 4", "ann", True),
        (identify("2+2?"), 1, "4", "A: 5", "bob", False),
        (identify("2*3?"), 0, "6", "A: 6", "ann", True),
    ]
    assert found.metrics == {"data/solutions": 3, "data/questions": 2, "data/right_share": pytest.approx(2 / 3)}


def test_flat_rows_of_one_question_are_its_samples_in_any_order(store: Store, tmp_path: Path) -> None:
    found = read_solutions(flat(written(tmp_path, FLAT)))
    assert cells(found, "question_id", "sample", "answer", "solution", "author", "label") == [
        (identify("2+2?"), 0, "4", "A: 4", "ann", True),
        (identify("2*3?"), 0, "6", "A: 5", "bob", False),
        (identify("2+2?"), 1, "4", "A: 3", None, False),
    ]


def test_a_file_without_labels_or_authors_has_none(store: Store, tmp_path: Path) -> None:
    found = read_solutions(flat(written(tmp_path, FLAT), label=None, author=None))
    assert set(cells(found, "author", "label")) == {(None, None)}
    assert "data/right_share" not in found.metrics


@pytest.mark.parametrize(
    ("row", "place", "value", "message"),
    [
        (1, "gold", "6", "line 2: question without an answer: no 'A:' in column 'gold'"),
        (0, "ann", {"text": "A: 4", "good": "yes"}, "line 1, ann: label 'good': expected true or false"),
        (0, "ann", {"text": "A: 4"}, "line 1, ann: label 'good': expected true or false (or 1 or 0), found None"),
        (
            0,
            "bob",
            {"text": ["A: 5"], "good": True},
            "line 1, bob: column 'text': expected text or a number, found list",
        ),
        (1, "question", "2+2?", "line 2: the answer '6', where"),
    ],
)
def test_a_fault_names_row_author_and_column(
    store: Store, tmp_path: Path, row: int, place: str, value: Any, message: str
) -> None:
    rows = [dict(each) for each in NESTED]
    rows[row][place] = value
    with pytest.raises(DataError) as error:
        read_solutions(nested(written(tmp_path, rows)))
    assert message in str(error.value)


def test_an_author_who_is_no_column_is_refused_with_the_columns_there_are(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'eve'; found columns \['ann', 'bob', 'gold', 'question'\]"):
        read_solutions(nested(written(tmp_path, NESTED), authors=["ann", "eve"]))


def test_a_flat_row_without_a_solution_is_a_fault(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: no solution: column 'solution' is empty"):
        read_solutions(flat(written(tmp_path, [{**FLAT[0], "solution": " "}])))


def test_a_file_is_flat_or_nested() -> None:
    with pytest.raises(ConfigError, match="set one of them"):
        flat("x.jsonl", authors=["ann"])
    with pytest.raises(ConfigError, match="each column once"):
        nested("x.jsonl", authors=["ann", "ann"])


def many(count: int, per_question: int = 3) -> Solutions:
    key = [(f"{number}+1?", sample) for number in range(count) for sample in range(per_question)]
    rows = [{"question_id": identify(asked), "sample": sample, "question": asked} for asked, sample in key]
    return Solutions.write([{**row, "answer": "1", "solution": "A: 1", "author": None, "label": None} for row in rows])


def test_the_parts_of_a_split_share_no_question_and_lose_none(store: Store) -> None:
    whole = many(200)
    parts = [take_solutions(whole, start=start, stop=stop) for start, stop in ((0.0, 0.2), (0.2, 0.4), (0.4, 1.0))]
    questions = [{row["question_id"] for row in part.rows()} for part in parts]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 200
    assert sum(len(part.rows()) for part in parts) == 600
    assert 20 <= len(questions[0]) <= 60  # a fifth of 200, within 3.5 standard deviations


def test_the_border_is_that_of_held_out_texts_whatever_else_is_in_the_file(store: Store) -> None:
    few, more = (take_solutions(many(count), start=0.0, stop=0.3).rows() for count in (50, 100))
    assert {row["question"] for row in few} == {f"{n}+1?" for n in range(50) if is_held_out(f"{n}+1?", 0.3)}
    assert {row["question"] for row in few} <= {row["question"] for row in more}


def test_an_empty_part_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match=r"none of 2 questions lies between 0\.0 and 1e-09"):
        take_solutions(many(2), start=0.0, stop=1e-9)


def test_questions_come_once_with_their_answers(store: Store, tmp_path: Path) -> None:
    asked = questions_of(read_solutions(flat(written(tmp_path, FLAT)))).rows()
    assert [(row["question"], row["answer"], row["solution"]) for row in asked] == [
        ("2+2?", "4", None),
        ("2*3?", "6", None),
    ]


def test_solutions_as_outputs_are_prompt_text_and_end_of_sequence(store: Store, tmp_path: Path) -> None:
    solutions = read_solutions(nested(written(tmp_path, NESTED)))
    prompt = PromptConfig(suffix="\n")
    model = create_policy(PolicyConfig(), demonstrations_of(solutions), prompt)
    outputs = solution_outputs(model, solutions, prompt)
    tokenizer = load_tokenizer(model)
    rows = outputs.rows()
    assert [(row["question_id"], row["sample"], row["text"]) for row in rows] == cells(
        solutions, "question_id", "sample", "solution"
    )
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "2+2?\n"
    assert [row["output_ids"][-1] for row in rows] == [tokenizer.eos_token_id] * 3
    assert rows[1]["text_ends"] == [1, 2, 3, 4, 4]  # "A: 5" by characters, then the end
    assert [row["logprobs"] for row in rows] == [None] * 3


def test_long_solutions_are_left_out_and_counted_where_a_limit_is_set(store: Store, tmp_path: Path) -> None:
    solutions, prompt = read_solutions(nested(written(tmp_path, NESTED))), PromptConfig()
    model = create_policy(PolicyConfig(), demonstrations_of(solutions), prompt)
    outputs = solution_outputs(model, solutions, prompt, max_tokens=9)  # 4 + 5 are 9; the first has 4 + 10 + 1
    assert [row["text"] for row in outputs.rows()] == ["A: 5", "A: 6"]
    assert outputs.metrics == {"data/left_out": 1, "data/tokens_mean": 9, "data/tokens_most": 9}
    with pytest.raises(DataError, match="every solution is longer than max_tokens"):
        solution_outputs(model, solutions, prompt, max_tokens=8)


def test_a_solution_beyond_the_window_is_refused_by_its_row(store: Store, tmp_path: Path) -> None:
    solutions, prompt = read_solutions(nested(written(tmp_path, NESTED))), PromptConfig()
    small = PolicyConfig(settings={**PolicyConfig().settings, "max_position_embeddings": 9})
    model = create_policy(small, demonstrations_of(solutions), prompt)
    with pytest.raises(DataError, match=rf"\('{identify('2+2?')}', 0\): expected at most 9 tokens .*, found 15"):
        solution_outputs(model, solutions, prompt)


def test_the_5276_labelled_gsm8k_solutions_are_read_with_their_labels(store: Store, data_dir: Path) -> None:
    source = {
        "path": str(data_dir / "gsm8k" / "gsm8k_example_model_solutions.jsonl"),
        "columns": {"answer": None, "solution": "ground_truth"},
        "answer_marker": "A:",
    }
    config = SolutionFileConfig.parse({"source": source, "authors": list(MODELS), "label": "is_correct"})
    solutions = read_solutions(config)
    assert (solutions.metrics["data/solutions"], solutions.metrics["data/questions"]) == (5276, 1319)
    right = {
        name: [label for author, label in cells(solutions, "author", "label") if author == name] for name in MODELS
    }
    shares = [round(100 * sum(labels) / len(labels), 1) for labels in right.values()]
    assert shares == [21.7, 39.0, 34.7, 56.3]
