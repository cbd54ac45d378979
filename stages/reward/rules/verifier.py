"""math-verify as it runs in a worker process: symbolic comparison of one answer with one gold answer.

Only its LaTeX parser is used, on what `formula` lets through: its search for a number would take one out of a formula that
it cannot read. Its own alarms are off: they need the main thread and cannot interrupt C code, and the pool already has a
deadline. Model text reaches math-verify's grammar, never `sympify` or `eval`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final, Literal

from stages.reward.rules.formula import as_formula, is_name, parts, sides

Verdict = Literal["equal", "different", "no_answer", "no_gold"]

_FINE: Final = 120
"""Digits with which numbers are compared that are too small for math-verify's fifteenth decimal place."""
_SMALL: Final = 1e-6
_FUNCTION: Final = re.compile(r"\s*[A-Za-z]\s*\(\s*x\s*\)\s*=")
_ORDINATE: Final = re.compile(r"\s*y\s*=")
_VECTOR: Final = re.compile(
    r"\\begin\s?\{(?:[pbB]?(?:small)?matrix|array)\}\s*(?:\{[lcr|]+\})?((?:(?!\\begin).)*)\\end\s?\{\w+\}", re.DOTALL
)
_BRACKETED: Final = re.compile(r"^(?:\(|\[|\\langle)(.*)(?:\)|\]|\\rangle)$", re.DOTALL)
_POINTS: Final = 24
"""Points at which formulas in variables are compared."""
_SIZES: Final = (1, 30, 1000, 10**6)
"""Factors of the values that variables take there, which are up to 5."""
_MOST_VARIABLES: Final = 4
_TOLERANCE: Final = 1e-25
_ROUNDING: Final = 0.05
"""Largest relative distance of a value from what is said to be approximately equal to it."""


def compare_symbolically(gold: str, answer: str | None, searched: str | None = None) -> Verdict:
    """Return whether `answer` states the value that `gold` states.

    An equation is worth what it equates: the name of the quantity goes where the gold has none, and of a chain all values must
    be the gold's (`41=42` is not 42).

    Args:
        gold: the gold answer.
        answer: the answer found, or None.
        searched: a text through which math-verify's own search looks, where the answer found is no formula.
    """
    expected, stated = as_formula(gold), None if answer is None else as_formula(answer)
    if stated is None and searched:
        return _search(gold, searched)
    if expected is not None and stated is not None:
        expected, stated = _as_vectors(*_as_functions(expected, stated))
    if expected is None or not _parse(_named_apart(expected, stated)):
        return "no_gold"
    if stated is None:
        return "no_answer"
    expected = _named_apart(expected, stated)
    values = _values(stated, expected)
    if values is None:
        return "different"
    parsed = [_parse(value) for value in values]
    if not all(parsed):
        return "no_answer"
    return "equal" if all(_equal(_parse(expected), value) for value in parsed) else "different"


def _search(gold: str, text: str) -> Verdict:
    from math_verify import parse, verify

    formula = as_formula(gold)
    golds: list[Any] = (_parse(formula) if formula else []) or parse(f"${gold}$", parsing_timeout=None)
    found: list[Any] = parse(text, parsing_timeout=None)
    if not golds:
        return "no_gold" if formula else "different"
    if not found:
        return "no_answer"
    return "equal" if verify(golds, found, timeout_seconds=None) else "different"


def _as_functions(gold: str, answer: str) -> tuple[str, str]:
    """Return both formulas with one name for the dependent quantity: `y = 2x + 3` describes the function `f(x) = 2x + 3`."""
    if (function := _FUNCTION.match(gold)) and _ORDINATE.match(answer):
        return gold, _ORDINATE.sub(function[0], answer)
    if (function := _FUNCTION.match(answer)) and _ORDINATE.match(gold):
        return _ORDINATE.sub(function[0], gold), answer
    return gold, answer


def _as_vectors(gold: str, answer: str) -> tuple[str, str]:
    """Return both formulas as matrices, where one is a matrix of one row or column and the other a tuple of as many entries."""
    for vector, other in ((gold, answer), (answer, gold)):
        column = _VECTOR.fullmatch(vector.strip())
        if column is None or "\\begin" in other or "=" in other:
            continue
        separator = r"\\" if r"\\" in column[1] else "&"
        entries = [entry.strip() for entry in column[1].strip().removesuffix(separator).split(separator)]
        given = parts(_BRACKETED.sub(r"\1", other.replace(r"\left", "").replace(r"\right", "").strip()))
        if len(entries) == len(given) > 1 and not any("&" in entry or r"\\" in entry for entry in entries):
            matrices = [rf"\begin{{pmatrix}}{separator.join(side)}\end{{pmatrix}}" for side in (entries, given)]
            return (matrices[0], matrices[1]) if vector is gold else (matrices[1], matrices[0])
    return gold, answer


def _named_apart(gold: str, answer: str | None) -> str:
    """Return the gold answer without the names of its quantities, where the answer has none."""
    if answer is None or "=" in answer or "=" not in gold:
        return gold
    members = parts(gold)
    values = [_value_of(part) for part in members]
    names = {part.replace(value, "", 1).strip(" =") for part, value in zip(members, values, strict=True)}
    ordered = len(names) == len(values) > 1 and "" not in names  # x=1, y=2 is the pair (1, 2), and x=1, x=2 a set
    return f"({','.join(values)})" if ordered else ",".join(values)


def _value_of(part: str) -> str:
    core = part.strip()
    if "=" in core and len(sides(core)) == 1 and core.startswith("(") and core.endswith(")"):
        return f"({','.join(map(_value_of, parts(core[1:-1])))})"
    match [side for side in sides(part) if side.strip()]:
        case [name, value] if is_name(name):
            return value
        case [value, name] if is_name(name):
            return value
        case _:
            return part


def _values(answer: str, gold: str) -> list[str] | None:
    """Return the values that an answer equates, each to be compared; None for an equation where the gold is a value."""
    valued = answer if "=" in gold else _first_approximated(answer)
    if valued is None:
        return None
    answer, chain = valued, sides(valued)
    if len(chain) == 1:
        return [answer]
    listed = parts(answer)
    if "=" in gold:
        return [answer]  # math-verify's policy: the last value of a chain counts
    if len(listed) > 1:
        values = [_value_of(part) for part in listed]
        return None if any("=" in value for value in values) else [",".join(values)]
    if any(not side.strip() for side in chain):
        return None
    if is_name(chain[0]):
        return chain[1:]
    return chain[:-1] if is_name(chain[-1]) else chain


def _first_approximated(answer: str) -> str | None:
    r"""Return the exact side of `\frac{1}{3} \approx 0.333`, the value of `x \approx 0.333`; None where they are not near."""
    exact, sign, rounded = answer.partition(r"\approx")
    if not sign:
        return answer
    if not exact.strip() or is_name(exact):
        return rounded
    if "=" in exact:
        return exact
    return exact if _near(_parse(exact), _parse(rounded)) else None


def _near(exact: list[Any], rounded: list[Any]) -> bool:
    try:
        x, y = (complex(side[0].evalf(15)) for side in (exact, rounded))
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    return abs(x - y) <= _ROUNDING * abs(x)


@lru_cache(maxsize=256)  # G outputs share a gold answer
def _parse(latex: str) -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    reading = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    found: list[Any] = parse(
        f"${latex}$",
        [LatexExtractionConfig(normalization_config=reading, boxed_match_priority=-1)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    if not verify(gold, answer, timeout_seconds=None):
        return _equal_values(gold[0], answer[0])
    if not any(map(_is_small, (*gold, *answer))):
        return True
    exact = [[_without_floats(each) for each in side] for side in (gold, answer)]
    return bool(verify(*exact, numeric_precision=_FINE, float_rounding=_FINE, timeout_seconds=None))


def _equal_values(gold: Any, answer: Any) -> bool:
    """Return whether formulas that sympy does not prove equal have equal values.

    `i` is the imaginary unit where the gold has no other variable. Formulas in variables are compared at `_POINTS` points, to
    30 digits. Both must be real at the same points, and at a quarter of them: the root of x^2 is not x.
    """
    from sympy import Expr, I  # type: ignore[import-untyped]

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    gold, answer = (_plain(_without_floats(side)) for side in (gold, answer))
    if not gold.free_symbols >= answer.free_symbols:
        return False
    names = sorted(gold.free_symbols, key=str)
    if [str(name) for name in names] == ["i"]:
        return bool((gold - answer).subs(names[0], I).expand().is_zero)
    if not 0 < len(names) <= _MOST_VARIABLES or set(names) != answer.free_symbols or not _is_elementary(gold, answer):
        return False
    compared = 0
    for place in range(_POINTS):
        point = {name: _coordinate(place, axis) for axis, name in enumerate(names)}
        values = [_real_value(side, point) for side in (gold, answer)]
        if values == [None, None]:
            continue
        if None in values or abs(values[0] - values[1]) > _TOLERANCE * max(abs(values[0]), abs(values[1])):
            return False
        compared += 1
    return compared >= _POINTS // 4


def _plain(formula: Any) -> Any:
    """Return the formula in symbols without assumptions: the parser calls an `i` real in one formula and not in another."""
    from sympy import Symbol

    return formula.xreplace({symbol: Symbol(symbol.name) for symbol in formula.free_symbols})


def _is_elementary(*formulas: Any) -> bool:
    """Return whether formulas are made of powers, exponentials, logarithms and trigonometric functions alone."""
    from sympy import Abs, Add, Mul, Pow, exp, log, preorder_traversal
    from sympy.functions.elementary.trigonometric import (  # type: ignore[import-untyped]
        InverseTrigonometricFunction,
        TrigonometricFunction,
    )

    known = (Add, Mul, Pow, exp, log, Abs, TrigonometricFunction, InverseTrigonometricFunction)
    return all(part.is_Atom or isinstance(part, known) for each in formulas for part in preorder_traversal(each))


def _coordinate(place: int, axis: int) -> Any:
    """Return the value of a variable at a point: a fraction unlike any that a formula has, of either sign and any size.

    Sizes matter: the root of (x - 10)^2 is 10 - x as far as 10.
    """
    from sympy import Rational

    size = (7919 * (place + 1) * (axis + 2) ** 2 + 104_729 * axis) % 9973 + 1
    sign = 1 if (place >> axis) % 2 == 0 else -1
    return Rational(sign * size, 1999) * _SIZES[(place // 2 + 2 * axis) % len(_SIZES)]


def _real_value(formula: Any, point: dict[Any, Any]) -> Any:
    """Return the value of a formula at a point; None where it is not a real number."""
    real, imaginary = formula.evalf(30, subs=point).as_real_imag()
    if not (real.is_Float or real.is_Integer or real.is_Rational) or abs(imaginary) > _TOLERANCE * abs(real):
        return None
    return real


def _is_small(expression: Any) -> bool:
    """Return whether a number in it is so near zero that another one would count as equal."""
    from sympy import preorder_traversal

    return any(
        (getattr(part, "is_number", False) and not part.is_Atom and 0 < abs(complex(part.evalf(15))) < _SMALL)
        or (getattr(part, "is_Float", False) and 0 < abs(part) < _SMALL)
        for part in preorder_traversal(expression)
    )


def _without_floats(expression: Any) -> Any:
    from sympy import Float, Rational

    return expression.replace(lambda part: isinstance(part, Float), lambda part: Rational(str(part)))
