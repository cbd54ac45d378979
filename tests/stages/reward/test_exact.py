"""The fast path: what it settles, what it leaves open, and what it must never accept."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from stages.reward.rules.exact import canonical, compare_exactly, normalise_text, read_number


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("17", "17"),
        ("17", "17."),
        ("17", " $17 "),
        ("17", "17.00"),
        ("17", "+17"),
        ("-3", "−3"),
        ("65,960", "65960"),
        ("3000", "3,000"),
        ("1000", "1 000"),
        ("23000", r"\$23{,}000"),
        ("17", "17 dollars"),
        ("17", "17 blue marbles"),
        ("10", r"10\text{ cm}^2"),
        ("13", "13只"),
        ("0.5", "1/2"),
        ("1/2", "2/4"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\frac13", r"\frac{1}{3}"),
        ("0.5", ".5"),
        ("25", "25%"),
        ("25%", "25 percent"),
        (r"10\%", "0.1"),
        ("0.3", "0.30000000000000004"),
        ("1/12", "0.0833333333333333"),
        ("5000000", "5 million"),
        ("even", r"\text{Even}"),
        (r"\left(1,2\right)", "(1, 2)"),
        ("1.22", "1,22"),
        ("0,111", "0.111"),
        ("2.5", "2 1/2"),
        (r"2\frac{1}{2}", "5/2"),
        ("-1 1/2", "-1.5"),
        (r"3.54 \times 10^{-7}", "3.54e-07"),
        ("1500000", "1.5*10^6"),
        ("p=5,q=2,p=7,q=2", r"p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2"),
        ("2, 3", "2; 3"),
        ("2, 3 and 5", "2,3,5"),
    ],
)
def test_equal_answers_are_equal(gold: str, answer: str) -> None:
    assert compare_exactly(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("17", "18"),
        ("17", "-17"),
        ("17", "1.7"),
        ("17", "17 thousand"),
        ("5", "5.001"),
        ("1000001", "1000001.5"),
        ("0.0000001", "0.0000002"),
        ("42", "42.001"),
        ("1/3", "0.33"),
        ("17", "unknown"),
        ("odd", "even"),
        ("C", "D"),
        ("2.5", "2 1/3"),
        ("2.5", r"2\frac{1}{3}"),
        ("3.54", r"3.54\times10^{2}"),
        ("17", "17^2"),
        ("2", "3万"),
        ("42", "4²"),
        ("10^{-20}", "10^{-21}"),
        ("3", r"3.\overline{3}"),
        ("3", "3 dozen"),
        ("5 km", "5 m"),
        ("5 hours", "5 minutes"),
    ],
)
def test_different_answers_are_different(gold: str, answer: str) -> None:
    assert compare_exactly(gold, answer) is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("17", "17 or 18"),
        ("17", "17x"),
        ("17", "17 = 18"),
        ("17", "17+0"),
        ("17", "17!"),
        ("17", "12,345,6"),
        ("17", "17 and a half"),
        ("17", "1" * 401),
        ("x+1", "1+x"),
        ("ab", "ba"),
        ("2", "1/0"),
        ("122", "1,22"),
        ("111", "0,111"),
        ("(1,22)", "1.22"),
        ("3", "2 3/2"),
        ("1", r"2\frac{3}{2}"),
        ("334", "1 002/3"),
    ],
)
def test_what_needs_more_than_arithmetic_is_left_open(gold: str, answer: str) -> None:
    assert compare_exactly(gold, answer) is None


def test_separators_of_lists_cost_milliseconds() -> None:
    started = time.process_time()
    for bait in (" " * 500, r"\quad" * 100, " and" * 120, ", " * 250, "1 " * 250, "1" * 250 + " " * 250 + "x"):
        compare_exactly("17", f"1{bait}2")
    assert time.process_time() - started < 0.2


def test_numbers_are_read_exactly() -> None:
    assert read_number("0.1").value == Fraction(1, 10)  # type: ignore[union-attr]
    assert read_number("3.54e-07").value == Fraction(354, 10**9)  # type: ignore[union-attr]
    assert read_number("$-1,234.50$").value == Fraction(-2469, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("$1,000.50 dollars", "1000.5"),
        ("25 %", "25%"),
        ("-0.05", "-0.05"),
        ("2/6", "1/3"),
        (r"\left( x \right)", "(x)"),
    ],
)
def test_equal_answers_share_one_spelling(answer: str, expected: str) -> None:
    assert canonical(answer) == expected


def test_single_letters_keep_their_case() -> None:
    assert normalise_text("x") != normalise_text("X")
    assert normalise_text("White") == normalise_text("white")
