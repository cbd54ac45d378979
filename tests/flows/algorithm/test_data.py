"""What a run starts from: question sets of others, with solutions to imitate or without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.algorithm.data import below, prepare_data
from flows.config import FileData
from flows.config.recipes import gsm8k_cpu
from flows.planning.request import sizes_for
from pipeline.store import Store
from stages.data import QuestionFileConfig
from stages.tables import DataError


def files(folder: Path, train: str) -> FileData:
    (folder / "train.csv").write_text(train)
    (folder / "test.csv").write_text("task,gold\n1+1?,2\n")
    columns = {"question": "task", "answer": "gold"}
    part = {name: {"path": f"{name}.csv", "columns": columns} for name in ("train", "test")}
    return FileData.parse({"path": str(folder), "train": part["train"], "evaluation": {"test": part["test"]}})


def test_questions_without_solutions_are_data_for_rl_and_give_no_demonstrations(store: Store, tmp_path: Path) -> None:
    data = prepare_data(files(tmp_path, "task,gold\n2+2?,4\n3+3?,6\n"))
    assert [row["answer"] for row in data.train.rows()] == ["4", "6"]
    assert data.demonstrations is None
    assert [row["question"] for row in data.evaluation["test"].rows()] == ["1+1?"]


def test_solutions_become_demonstrations_and_a_single_one_that_lacks_is_named(store: Store, tmp_path: Path) -> None:
    data = prepare_data(files(tmp_path, "task,gold,solution\n2+2?,4,two and two\n"))
    assert data.demonstrations is not None
    assert data.demonstrations.rows()[0]["completion"] == "two and two\n#### 4"
    with pytest.raises(DataError, match=r"row 1 .* has no solution"):
        prepare_data(files(tmp_path, "task,gold,solution\n2+2?,4,two and two\n3+3?,6,\n"))


@pytest.mark.parametrize(
    ("path", "format", "found"),
    [
        ("q.jsonl", "auto", "folder/q.jsonl"),
        ("/abs/q.jsonl", "auto", "/abs/q.jsonl"),
        ("~/q.jsonl", "auto", str(Path.home() / "q.jsonl")),
        ("openai/gsm8k", "hub", "openai/gsm8k"),
    ],
)
def test_paths_of_sets_are_below_the_data_s_folder_but_for_hub_names(path: str, format: str, found: str) -> None:
    assert below("folder", QuestionFileConfig.parse({"path": path, "format": format})).path == found


def test_a_plan_waits_for_no_pipe_in_the_place_of_a_set(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gsm8k_test.jsonl")
    sizes, said = sizes_for(gsm8k_cpu().override({"data.path": str(tmp_path)}))
    assert sizes == {"test": 256}
    assert "is not here" in said[0]
