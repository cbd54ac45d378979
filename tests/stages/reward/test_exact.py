"""The fast path: what it settles, what it leaves open, and what it must never accept."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from stages.reward.rules.exact import canonical, compare_exactly, normalise_text, read_number


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("17", "17", True),
        ("17", "17.", True),
        ("17", " $17 ", True),
        ("17", "17.00", True),
        ("17", "+17", True),
        ("-3", "−3", True),
        ("65,960", "65960", True),
        ("3000", "3,000", True),
        ("1000", "1 000", True),
        ("23000", r"\$23{,}000", True),
        ("17", "17 dollars", True),
        ("17", "17 blue marbles", True),
        ("10", r"10\text{ cm}^2", True),
        ("13", "13只", True),
        ("0.5", "1/2", True),
        ("1/2", "2/4", True),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac13", r"\frac{1}{3}", True),
        ("0.5", ".5", True),
        ("25", "25%", True),
        ("25%", "25 percent", True),
        (r"10\%", "0.1", True),
        ("0.3", "0.30000000000000004", True),
        ("1/12", "0.0833333333333333", True),
        ("5000000", "5 million", True),
        ("even", r"\text{Even}", True),
        (r"\left(1,2\right)", "(1, 2)", True),
        ("1.22", "1,22", True),
        ("0,111", "0.111", True),
        ("2.5", "2 1/2", True),
        (r"2\frac{1}{2}", "5/2", True),
        ("-1 1/2", "-1.5", True),
        (r"3.54 \times 10^{-7}", "3.54e-07", True),
        ("1500000", "1.5*10^6", True),
        ("p=5,q=2,p=7,q=2", r"p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2", True),
        ("2, 3", "2; 3", True),
        ("2, 3 and 5", "2,3,5", True),
        ("17", "18", False),
        ("17", "-17", False),
        ("17", "1.7", False),
        ("17", "17 thousand", False),
        ("5", "5.001", False),
        ("1000001", "1000001.5", False),
        ("0.0000001", "0.0000002", False),
        ("42", "42.001", False),
        ("1/3", "0.33", False),
        ("17", "unknown", False),
        ("odd", "even", False),
        ("C", "D", False),
        ("2.5", "2 1/3", False),
        ("2.5", r"2\frac{1}{3}", False),
        ("3.54", r"3.54\times10^{2}", False),
        ("17", "17^2", False),
        ("2", "3万", False),
        ("42", "4²", False),
        ("10^{-20}", "10^{-21}", False),
        ("3", r"3.\overline{3}", False),
        ("3", "3 dozen", False),
        ("5 km", "5 m", False),
        ("5 hours", "5 minutes", False),
        ("17", "17 or 18", None),
        ("17", "17x", None),
        ("17", "17 = 18", None),
        ("17", "17+0", None),
        ("17", "17!", None),
        ("17", "12,345,6", None),
        ("17", "17 and a half", None),
        ("17", "1" * 401, None),
        ("x+1", "1+x", None),
        ("ab", "ba", None),
        ("2", "1/0", None),
        ("122", "1,22", None),
        ("111", "0,111", None),
        ("(1,22)", "1.22", None),
        ("3", "2 3/2", None),
        ("1", r"2\frac{3}{2}", None),
        ("334", "1 002/3", None),
    ],
)
def test_answers_are_equal_different_or_left_open_where_arithmetic_ends(
    gold: str, answer: str, equal: bool | None
) -> None:
    assert compare_exactly(gold, answer) is equal


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
