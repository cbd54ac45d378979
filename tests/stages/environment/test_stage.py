"""Answers to the calls of outputs: one row for each that waits, from what is recorded alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from stages.environment import CalculatorConfig, answer_calls
from stages.join import JoinError
from stages.tables import Questions, Rollouts, ToolCalls
from tests.stages.rows import question_rows, rollout_row

pytestmark = pytest.mark.usefixtures("store")


def written(name: str, sample: int, text: str, turns: list[tuple[int, int]] | None, reason: str) -> dict[str, Any]:
    """Return an output of a token for each character."""
    spans = None if turns is None else [{"start": start, "end": end} for start, end in turns]
    ids, ends = list(range(len(text))), list(range(1, len(text) + 1))
    return rollout_row(name, sample, ids, text=text, text_ends=ends, finish_reason=reason, turns=spans)


def test_each_output_that_waits_gets_a_row_behind_those_of_the_turns_before() -> None:
    questions = Questions.write(question_rows("a", "b"))
    first = Rollouts.write(
        [
            written("q0", 0, "[1+1]", None, "call"),
            written("q0", 1, "2", None, "stop"),
            written("q1", 0, "[x]", None, "call"),
        ]
    )
    calls = answer_calls(first, questions, None, CalculatorConfig())
    assert [(row["question_id"], row["sample"], row["turn"], row["status"]) for row in calls.rows()] == [
        ("q0", 0, 0, "ok"),
        ("q1", 0, 0, "error"),
    ]
    assert (calls.metrics["tool/calls"], calls.metrics["tool/ok_rate"], calls.metrics["tool/error_rate"]) == (
        2,
        0.5,
        0.5,
    )
    # Two calls of three outputs, of which two called.
    assert (calls.metrics["tool/calls_mean"], calls.metrics["tool/used_rate"]) == (2 / 3, 2 / 3)
    # What was observed, `=2\n` with a call in it, is no part of the next turn.
    second = Rollouts.write(
        [written("q0", 0, "[1+1]=[9]\n2*[2+3]", [(0, 5), (10, 17)], "call"), written("q1", 0, "[x]", None, "length")]
    )
    more = answer_calls(second, questions, calls, CalculatorConfig())
    assert more.rows()[:2] == calls.rows()
    (row,) = more.rows()[2:]
    assert (row["turn"], row["input"], row["output"], row["observation"]) == (1, "2+3", "5", "=5\n")
    assert more.metrics["time/tools"] >= calls.metrics["time/tools"]
    assert (more.metrics["tool/calls_mean"], more.metrics["tool/used_rate"]) == (3 / 2, 1.0)


def test_no_output_that_waits_gives_no_row_and_no_rate() -> None:
    outputs = Rollouts.write([written("q0", 0, "[1+1]", None, "stop")])
    calls = answer_calls(outputs, Questions.write(question_rows("a")), None, CalculatorConfig())
    assert calls.rows() == ToolCalls.write([]).rows() == []
    assert calls.metrics.get("tool/ok_rate") is None
    assert (calls.metrics["tool/calls_mean"], calls.metrics["tool/used_rate"]) == (0.0, 0.0)


def test_an_output_without_its_question_is_refused_by_name() -> None:
    outputs = Rollouts.write([written("q7", 0, "[1+1]", None, "call")])
    with pytest.raises(JoinError) as refused:
        answer_calls(outputs, Questions.write(question_rows("a")), None, CalculatorConfig())
    assert refused.value.missing == "q7"


@pytest.mark.parametrize(
    ("texts", "warned"), [(["[x]"] * 8, True), (["[x]"] * 8 + ["[1]"], False), (["[x]"] * 7, False)]
)
def test_it_is_said_where_each_of_many_calls_failed(texts: list[str], warned: bool) -> None:
    outputs = Rollouts.write([written("q0", sample, text, None, "call") for sample, text in enumerate(texts)])
    with warnings.catch_warnings(record=True) as caught:
        answer_calls(outputs, Questions.write(question_rows("a")), None, CalculatorConfig())
    assert ["each of 8 calls failed" in str(warning.message) for warning in caught] == [True] * warned
