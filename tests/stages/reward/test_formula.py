"""An answer as one LaTeX formula: what is translated, and what is refused because the parser behind it would guess."""

from __future__ import annotations

import pytest

from stages.reward.rules.formula import as_formula, is_name, parts, sides
from stages.reward.rules.numerals import to_latin


@pytest.mark.parametrize(
    ("answer", "formula"),
    [
        (r"4\sqrt(2)", r"4\sqrt{2}"),
        ("4√2", r"4\sqrt{2}"),
        ("∛8", r"\sqrt[3]{8}"),
        (r"3\frac(1)(2)", r"3\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        ("2**3", "2^{3}"),
        ("10^-2", "10^{-2}"),
        ("x^10", "x^{10}"),
        ("2pi", r"2\pi "),
        ("sin(x)", r"\sin (x)"),
        ("x²", "x^{2}"),
        (r"4\sqrt{2} cm", r"4\sqrt{2}"),
        (r"36\pi square inches", r"36\pi"),
        (r"4\sqrt{2}\text{ m}", r"4\sqrt{2}"),
        (r"2^\mathrm{99}", r"2^{99}"),
        ("3 or 4", "3 , 4"),
        ("1331 & 1728", "1331 , 1728"),
        ("3、4", "3,4"),
        (r"\boldsymbol{x+1}", "x+1"),
        (r"\$12\pi", r"12\pi"),
        (r"\angle A = 30", "A= 30"),
        ("x <= 2", r"x \le  2"),
    ],
)
def test_spellings_become_latex(answer: str, formula: str) -> None:
    found = as_formula(answer)
    assert found is not None
    assert found.replace(" ", "") == formula.replace(" ", "")


@pytest.mark.claim("a number taken out of an unread formula")
@pytest.mark.parametrize(
    "answer",
    ["3_2", "3'", r"3\ldots", "3...", "3 4", r"3\,4", "3~4", "3～4", "3或4", "3–2", "1.2.3", "3#", "3?", "3@", r"3\foo",
     r"n \equiv 1 \pmod 3", r"\forall x", r"2k, k\in\mathbb{Z}", "print(1) or 0", "3 squared", "odd", "the cat", "ABCD",
     "x if y", "12 or", "or 12", r"\overline{AB}", "", " ", "9" * 600, r"\begin{foo}1\end{foo}"],
)  # fmt: skip
def test_what_the_parser_would_drop_or_guess_is_no_formula(answer: str) -> None:
    assert as_formula(answer) is None


@pytest.mark.parametrize(
    ("text", "latin"),
    [
        ("１２", "12"),
        ("１，２３４", "1,234"),
        ("－１２", "-12"),
        ("５０％", "50%"),
        ("٤٥", "45"),
        ("𝟒𝟓", "45"),
        ("3²", "3^{2}"),
        ("x₁₂", "x_{12}"),
        ("½", r"\frac{1}{2}"),
        ("⅞", r"\frac{7}{8}"),
        ("–5", "-5"),
        ("3–2", "3–2"),
        ("π", r"\pi "),
        ("Δ", r"\Delta "),
        ("＋", "+"),
        ("1\u200b2", "12"),
        ("☃", "☃"),
    ],
)
def test_other_scripts_are_spelled_in_ascii_and_unknown_signs_stay(text: str, latin: str) -> None:
    assert to_latin(text) == latin


def test_equations_and_lists_are_split_where_nothing_is_open() -> None:
    assert sides("x=f(a=1)=3") == ["x", "f(a=1)", "3"]
    assert parts(r"\left(1,2\right),3") == [r"\left(1,2\right)", "3"]


@pytest.mark.parametrize(
    "name", ["x", "x_1", "x_{12}", "f(x)", "f(2)", r"\theta", "(x, y)", "AB", "P(A)", r"\frac{AB}{CD}"]
)
def test_names_of_quantities_are_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("value", ["2x", "x+y", "41", r"\pi", "e", "2", "x^2", r"\sqrt{x}"])
def test_values_are_not_names(value: str) -> None:
    assert not is_name(value)
