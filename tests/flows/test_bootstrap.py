"""What a run starts from: question sets of others, with solutions to imitate or without."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.bootstrap import prepare_data
from flows.config import FileData
from pipeline.store import Store
from stages.identity import DataError


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
