"""Calls of the outputs that dynamic sampling keeps: those of the draw that an output is from."""

from __future__ import annotations

from typing import Any

import pytest

from stages.environment import CalculatorConfig, answer_calls
from stages.selection import keep_calls, keep_informative
from stages.tables import Questions, Rollouts, ToolCalls
from tests.stages.advantage.tables import group, rewards_of
from tests.stages.rows import output_row

pytestmark = pytest.mark.usefixtures("store")


def draw(texts: dict[str, list[str]]) -> tuple[Rollouts, ToolCalls]:
    """Return outputs by question, which wait where they end in a call, and the calculator's answers."""
    rows = [
        output_row(name, sample, text, finish_reason="call" if text.endswith("]") else "stop")
        for name, outputs in texts.items()
        for sample, text in enumerate(outputs)
    ]
    for row in rows:  # the end of sequence is no part of a call
        if row["finish_reason"] == "call":
            row |= {name: row[name][:-1] for name in ("output_ids", "logprobs", "text_ends")}
    outputs = Rollouts.write(rows)
    asked = [{"question_id": name, "question": name, "answer": "", "solution": None} for name in texts]
    return outputs, answer_calls(outputs, Questions.write(asked), None, CalculatorConfig())


def kept(*draws: tuple[dict[str, list[str]], dict[str, list[float]]], size: int) -> ToolCalls:
    drawn = [draw(texts) for texts, _ in draws]
    rewards = [
        rewards_of([row for name, found in scores.items() for row in group(name, *found)]) for _, scores in draws
    ]
    outputs = [each for each, _ in drawn]
    return keep_calls(keep_informative(outputs, rewards, size=size), outputs, [calls for _, calls in drawn])


def inputs(calls: ToolCalls) -> list[tuple[Any, ...]]:
    return [(row["question_id"], row["sample"], row["input"], row["output"]) for row in calls.rows()]


def test_calls_are_those_of_the_questions_kept_by_the_draw_they_are_from() -> None:
    # b agrees and is left out; a is drawn again, and its first outputs stay.
    first = ({"a": ["[1+1]", "2"], "b": ["[2+2]", "[3+3]"]}, {"a": [0, 1], "b": [1, 1]})
    again = ({"a": ["[4+4]", "[5+5]"], "c": ["6", "[6+6]"]}, {"a": [0, 1], "c": [1, 0]})
    assert inputs(kept(first, again, size=2)) == [("a", 0, "1+1", "2"), ("c", 1, "6+6", "12")]


def test_metrics_count_the_calls_of_all_draws() -> None:
    first = ({"a": ["[1+1]", "2"], "b": ["[1/0]", "[3+3]"]}, {"a": [0, 1], "b": [1, 1]})
    second = ({"c": ["6", "7"]}, {"c": [1, 0]})
    metrics = kept(first, second, size=2).metrics
    assert (metrics["tool/calls"], metrics["tool/calls_mean"], metrics["tool/used_rate"]) == (3, 3 / 6, 3 / 6)
    assert (metrics["tool/ok_rate"], metrics["tool/error_rate"]) == (2 / 3, 1 / 3)


def test_draws_without_any_call_keep_none_and_have_no_rate() -> None:
    calls = kept(({"a": ["1", "2"]}, {"a": [0, 1]}), size=1)
    assert calls.rows() == []
    assert (calls.metrics["tool/calls"], calls.metrics.get("tool/ok_rate")) == (0, None)


def test_every_table_of_outputs_needs_its_calls() -> None:
    outputs, calls = draw({"a": ["[1+1]", "2"]})
    with pytest.raises(ValueError, match="shorter"):
        keep_calls(outputs, [outputs, outputs], [calls])
