"""A function as environment: it gets the dialogue and nothing else, and whatever it does costs its own output alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.workers.functions import call_plainly, find_source
from pipeline.workers.pool import KillablePool
from stages.environment import FunctionConfig
from stages.environment.answers import Answer, Dialogue
from stages.environment.function import Function, answer_of

MODULE = "tests.stages.environment.tools"


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    """Let the tests share worker processes."""
    yield
    evict("environment function")


def config(name: str = "answer", **fields: Any) -> FunctionConfig:
    return FunctionConfig(**{"function": f"{MODULE}:{name}", "call_ends": ("?",), "memory_mb": 256} | fields)


def asked(*turns: str, name: str = "answer", **fields: Any) -> list[Answer]:
    """Answer outputs of one turn each."""
    rows = [{"question_id": f"q{place}", "question": "1+1=?", "answer": "2"} for place in range(len(turns))]
    dialogues = [Dialogue(row, [turn], []) for row, turn in zip(rows, turns, strict=True)]
    return Function(config(name, **fields)).answer(dialogues)


def test_eight_calls_are_made_side_by_side(tmp_path: Path) -> None:
    rows = [{"question_id": f"q{place}", "answer": str(tmp_path)} for place in range(8)]
    found = Function(config(deadline=20.0)).answer([Dialogue(row, ["meet?"], []) for row in rows])
    assert [each.status for each in found] == ["ok"] * 8


def test_a_text_is_the_observation_and_a_mapping_says_more() -> None:
    number, gold, refused = asked("Look: 7?", "gold?", "refuse?")
    assert (number.tool, number.input, number.output, number.status) == ("answer", "Look: 7", "Look: 7", "ok")
    assert number.observation == "\ngot Look: 7\n"
    assert (gold.output, gold.observation, gold.done, number.done) == ("2", "\nright\n", True, False)
    assert (refused.status, refused.input, refused.output) == ("refused", "that", "not that")
    assert MODULE not in sys.modules, "it runs in workers only"


def test_a_state_comes_from_the_earlier_calls_alone() -> None:
    calls = [{"output": "3"}, {"output": "4"}]
    (answer,) = Function(config()).answer([Dialogue({}, ["3?", "4?", "sum?"], calls)])
    assert answer.output == "7"


def test_what_a_call_comes_to_costs_no_other_output_its_answer() -> None:
    found = asked("hang?", "1?", "allocate?", "2?", "raise?", "3?", "exit?", "4?", deadline=1.0)
    assert [each.status for each in found] == ["timeout", "ok", "memory", "ok", "error", "ok", "error", "ok"]
    assert found[0].observation == "\ntimeout: not done after 1 s\n"
    assert found[2].observation == "\nmemory: more than 256 MiB\n"
    assert found[4].observation == "\nerror: KeyError: 'no such page'\n"
    assert "exited with code 3" in found[6].observation
    assert [each.output for each in found[1::2]] == ["1", "2", "3", "4"]


def test_an_observation_is_cut_and_has_its_form_and_any_text() -> None:
    number, special = asked("123456?", "special?", max_observation=5, before_answer="<", after_answer=">")
    assert (number.observation, number.output) == ("<got 1...>", "123456")
    assert (special.observation, special.output) == ("<<|im_...>", "<|im_end|>?")


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("none", "NoneType"),
        ("number", "int"),
        ("thing", "object"),
        ("unnamed", "a mapping with 'answer'"),
        ("silent", "a mapping without `observation`"),
        ("strange", "'fine' as status"),
        ("undecided", "str as done"),
    ],
)
def test_another_answer_ends_the_run_with_function_and_type(case: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"{MODULE}:answer.* found {found}"):
        asked("1?", f"{case}?")


def test_a_function_that_does_not_take_a_dialogue_is_refused_before_any_call() -> None:
    with pytest.raises(ConfigError, match=f"{MODULE}:narrow.*turns"):
        asked("1?", name="narrow")


def test_the_source_of_the_function_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_tools.py"
    keys = []
    for text in ("first", "second"):
        file.write_text(f"def look(question, turns, calls):\n    return '{text}'\n")
        made = config(function="my_tools:look")
        keys.append(made.key()["source"])
        (answer,) = Function(made).answer([Dialogue({}, ["?"], [])])
        assert answer.output == text
    assert keys[0] != keys[1]


def test_a_source_that_changes_while_calls_are_answered_ends_the_run() -> None:
    changed = dataclasses.replace(find_source(f"{MODULE}:answer"), digest="0" * 64)
    pool = KillablePool(workers=1, memory_mb=256)
    (outcome,) = pool.run(call_plainly, [(changed, {})], deadline_s=20.0)
    pool.close()
    with pytest.raises(ConfigError, match=r"'answer'.*tools.py has changed"):
        answer_of(Dialogue({}, ["1?"], []), outcome, None, config(), tool="answer")


def test_an_end_within_another_is_refused() -> None:
    with pytest.raises(ValueError, match="call_ends"):
        config(call_ends=("</tool>", "</tool></call>"))
