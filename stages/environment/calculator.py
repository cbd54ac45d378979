"""A calculator: exact fractions, no names, no powers, so that no expression costs more than its own length."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

from stages.environment.answers import Answer, Dialogue, Status, cut
from stages.environment.config import CalculatorConfig

_LONGEST: Final = 400
"""Characters of an expression, at most."""
_DECIMALS: Final = 6
_OPERATIONS: Final[dict[type, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator:
    """Implement `Environment`: the expression between the marks of a turn's last call."""

    def __init__(self, config: CalculatorConfig) -> None:
        self._config = config

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each."""
        return [self._answer(dialogue.turns[-1]) for dialogue in dialogues]

    def _answer(self, text: str) -> Answer:
        config = self._config
        _, opened, expression = text.removesuffix(config.closes).rpartition(config.opens)
        if not opened:
            return self._said("", "error: no call", "error", "refused")
        try:
            value = calculate(expression)
        except CalculationError as error:
            return self._said(expression, f"error: {error}", "error", "error")
        return self._said(expression, value, value, "ok")

    def _said(self, expression: str, output: str, result: str, status: Status) -> Answer:
        config = self._config
        observation = f"{config.before_answer}{cut(result, config.max_observation)}{config.after_answer}"
        return Answer("calculator", expression, output, observation, status)


class CalculationError(ValueError):
    """An expression that has no value."""


def calculate(expression: str) -> str:
    """Return the value of an expression: whole, or with at most six decimals, the last one rounded half to even.

    Raises:
        CalculationError: other characters than those of numbers, + - * / and parentheses; no expression; division by zero.
    """
    if len(expression) > _LONGEST:
        raise CalculationError(f"expected at most {_LONGEST} characters, found {len(expression)}")
    if wrong := set(expression) - set("0123456789.+-*/() "):
        raise CalculationError(f"expected numbers, + - * / and parentheses, found {min(wrong)!r}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise CalculationError("not an expression") from None
    except ZeroDivisionError:
        raise CalculationError("division by zero") from None
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    whole, decimals = divmod(round(abs(value) * 10**_DECIMALS), 10**_DECIMALS)
    return f"{sign}{whole}.{decimals:0{_DECIMALS}d}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.Constant(value=float()):
            return Fraction(ast.unparse(node))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_value(left), _value(right))
    raise CalculationError("expected numbers, + - * / and parentheses")
