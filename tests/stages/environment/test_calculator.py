"""The calculator: exact, bounded, and refusing whatever is no arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError
from stages.environment import CalculatorConfig
from stages.environment.answers import Dialogue
from stages.environment.calculator import CalculationError, Calculator, calculate


def answer(text: str, **settings: object) -> tuple[str, str, str, str]:
    """Return input, output, observation and status of a turn's call."""
    (found,) = Calculator(CalculatorConfig().override(settings)).answer([Dialogue({}, ["earlier [1+1]", text], [])])
    return found.input, found.output, found.observation, found.status


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("347*290-118", "100512"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-7--7", "0"),
        ("10/4", "2.5"),
        ("1/3", "0.333333"),
        ("-2/3", "-0.666667"),
        ("0.1+0.2", "0.3"),
        ("1/3*3", "1"),
        ("1/10000000", "0"),
        (" 6 * 7 ", "42"),
        ("9" * 150 + "*" + "9" * 150, str(int("9" * 150) ** 2)),
    ],
)
def test_values_are_exact_up_to_six_decimals(expression: str, value: str) -> None:
    assert calculate(expression) == value


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 999)), min_size=1, max_size=6), st.integers(0, 999))
def test_whole_numbers_come_out_as_python_has_them(operations: list[tuple[str, int]], first: int) -> None:
    expression = str(first) + "".join(f"{sign}{number}" for sign, number in operations)
    assert Fraction(calculate(expression)) == eval(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "1/(2-2)", "2**9", "9**9**9", "1//2", "x", "__import__('os')", "1,2", "1e9", "0x10", "1 2", "1_0", "007",
        "(" * 300, "1+" * 150 + "1" * 200, "\N{ARABIC-INDIC DIGIT THREE}+1", "3j", "1if 1else 2", "1\n+1",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_has_no_value(expression: str) -> None:
    with pytest.raises(CalculationError):
        calculate(expression)


def test_signs_nested_as_deep_as_an_expression_may_be_have_a_value() -> None:
    assert calculate("-" * 50 + "1") == "1"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so [2+3]", ("2+3", "5", "=5\n", "ok")),
        ("[1+1] and [2*3]", ("2*3", "6", "=6\n", "ok")),
        ("[[2*3]", ("2*3", "6", "=6\n", "ok")),
        ("[1/0]", ("1/0", "error: division by zero", "=error\n", "error")),
        ("2+3]", ("", "error: no call", "=error\n", "refused")),
    ],
)
def test_the_last_call_of_the_turn_is_answered_between_the_marks(text: str, found: tuple[str, ...]) -> None:
    assert answer(text) == found


def test_marks_are_settings_and_long_results_are_cut() -> None:
    marks = {"opens": "<<", "closes": "=", "before_answer": "", "after_answer": ">>"}
    assert answer("<<48/2=", **marks) == ("48/2", "24", "24>>", "ok")
    assert answer("[100*100]", max_observation=3)[1:3] == ("10000", "=100...\n")
    with pytest.raises(ConfigError, match="closes"):
        CalculatorConfig().override({"opens": "|", "closes": "|"})
