"""Calls in JSON: each goes to the tool that it names, and what is no call is said to the policy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.residency import evict
from stages.environment import CalculatorConfig, PythonConfig, ToolCallsConfig, environment_of
from stages.environment.answers import Answer, Dialogue

CONFIG = ToolCallsConfig(tools=(CalculatorConfig(), PythonConfig(sandbox="limits")))

pytestmark = pytest.mark.filterwarnings("ignore:environment.sandbox=limits")


def call(name: str, **arguments: Any) -> str:
    """Return a turn that ends in a call."""
    return f"Let me see. <tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def asked(*turns: str, config: ToolCallsConfig = CONFIG) -> list[Answer]:
    """Answer outputs of one turn each."""
    try:
        return environment_of(config).answer([Dialogue({}, [turn], []) for turn in turns])
    finally:
        evict("sandboxes")


def test_calls_of_one_turn_go_to_their_tools_and_come_back_in_order() -> None:
    program = "x = [6, 7]\nprint(x[0] * x[1])"
    answers = asked(call("python", code=program), call("calculator", expression="1/8"), call("python", code="1/0"))
    assert [(answer.tool, answer.input, answer.status) for answer in answers] == [
        ("python", program, "ok"),
        ("calculator", "1/8", "ok"),
        ("python", "1/0", "error"),
    ]
    assert [answer.observation for answer in answers] == ["42", "0.125", "ZeroDivisionError: division by zero"]


def test_python_remembers_its_own_calls_and_not_those_of_another_tool() -> None:
    earlier = [
        {"tool": "python", "input": "x = 5", "status": "ok"},
        {"tool": "calculator", "input": "x = 6", "status": "ok"},
    ]
    turns = ["", "", call("python", code="print(x)")]
    (answer,) = environment_of(CONFIG).answer([Dialogue({}, turns, earlier)])
    evict("sandboxes")
    assert answer.observation == "5"


def test_a_program_is_written_with_its_newlines_as_they_are_too() -> None:
    (answer,) = asked('<tool_call>{"name": "python", "arguments": {"code": "x = 2\nx * 4"}}</tool_call>')
    assert (answer.status, answer.observation) == ("ok", "8")


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("no call</tool_call>", "no call"),
        ("<tool_call>{'name'}</tool_call>", "not JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "not JSON"),
        ("<tool_call>[1]</tool_call>", 'expected {"name"'),
        ('<tool_call>{"name": 1}</tool_call>', 'expected {"name"'),
        (call("perl", code="1"), "no tool 'perl'; there is calculator, python"),
        (call("python"), 'python: expected {"code": "..."}'),
        (call("python", code=1), 'python: expected {"code": "..."}'),
        ('<tool_call>{"name": "calculator", "arguments": "1+1"}</tool_call>', 'calculator: expected {"expression"'),
    ],
)
def test_what_is_no_call_is_refused_and_said_to_the_policy(turn: str, said: str) -> None:
    (answer,) = asked(turn)
    assert answer.status == "refused"
    assert said in answer.observation


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tools": []}, "tools"),
        ({"opens": "</tool_call>"}, "another text than opens"),
        ({"tools": [{"kind": "python"}, {"kind": "python"}]}, "each kind once"),
        ({"tools": [{"kind": "python", "opens": "<py>"}]}, "opens of python"),
        ({"tools": [{"kind": "calculator", "max_calls": 2}]}, "max_calls of calculator"),
    ],
)
def test_tools_that_would_be_ignored_in_part_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ToolCallsConfig.parse(settings)
