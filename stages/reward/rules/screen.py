"""What is refused before any parser sees it: answers whose evaluation could not end, found in microseconds.

A screened answer scores 0: nobody needs a tower of powers to answer a question that has an answer. The limits are generous
for real answers (`2^{1000}`, `\\binom{2010}{1005}`); what passes still runs in a process that is killed at a deadline.
"""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ["objection"]

_LONGEST: Final = 512
_DEEPEST: Final = 20
_MOST_DIGITS: Final = 400
_MOST_PARTS: Final = 64
_MOST_RELATIONS: Final = 12
_LARGEST_POWER_BITS: Final = 20_000
_LARGEST_SYMBOLIC_EXPONENT: Final = 64
_LARGEST_FACTORIAL: Final = 200
_LARGEST_CHOICE: Final = 10_000

_DIGITS: Final = re.compile(r"\d+", re.ASCII)
_CARET: Final = re.compile(r"\s*(?:\^|\*\*)\s*")
_SIGNED_NUMBER: Final = re.compile(r"[-+]?[\d.]+", re.ASCII)
_SEARCHING: Final = (r"\sum", r"\prod", r"\int", r"\lim", r"\det", r"\frac{d}{d", r"\gcd", r"\lcm", r"\log_{")


def objection(answer: str, gold: str) -> str | None:
    """Why `answer` is too complex to be compared with `gold`, or None.

    Sums, products, integrals, limits, determinants and derivatives are allowed only where the gold itself has them: an
    answer states a value, it does not leave the computing to the verifier.
    """
    answer = answer.replace(r"\!", "")  # a thin space, not a factorial
    if len(answer) > _LONGEST:
        return f"longer than {_LONGEST} characters"
    if any(len(digits) > _MOST_DIGITS for digits in _DIGITS.findall(answer)):
        return f"a literal of more than {_MOST_DIGITS} digits"
    if _depth(answer) > _DEEPEST:
        return f"nested deeper than {_DEEPEST}"
    if max(answer.count(mark) for mark in ("&", r"\\", ",", ";", r"\cup", "|")) > _MOST_PARTS:
        return f"more than {_MOST_PARTS} parts"
    if answer.count("=") > _MOST_RELATIONS:
        return f"more than {_MOST_RELATIONS} relations"
    for operator in _SEARCHING:
        if operator in answer and operator not in gold:
            return f"{operator} where the gold answer has none"
    return _factorial_objection(answer) or _power_objection(answer)


def _depth(answer: str) -> int:
    deepest = depth = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _factorial_objection(answer: str) -> str | None:
    largest = max((int(digits) for digits in _DIGITS.findall(answer)), default=0)
    if "!" in answer.replace("!=", "") and (largest > _LARGEST_FACTORIAL or answer.count("!") > 4 or ")!" in answer):
        return f"a factorial that may exceed {_LARGEST_FACTORIAL}!"
    if r"\binom" in answer and (largest > _LARGEST_CHOICE or "^" in answer):
        return f"a binomial coefficient that may exceed {_LARGEST_CHOICE}"
    if r"\sqrt[" in answer and largest > _LARGEST_CHOICE:
        return f"a root whose index may exceed {_LARGEST_CHOICE}"
    return None


def _power_objection(answer: str) -> str | None:
    compact = _CARET.sub("^", answer)
    if compact.count("^") > _MOST_PARTS:
        return f"more than {_MOST_PARTS} powers"
    if _exponent_nesting(compact) > 2:
        return "exponents nested deeper than 2"
    for position, character in enumerate(compact):
        if character != "^":
            continue
        exponent = _exponent(compact, position + 1)
        head = compact[:position]
        base = head[len(head.rstrip("0123456789.")) :]
        size = _magnitude(exponent)
        bits = size * max(_log2(base), 1.0) if base else size
        if bits > (_LARGEST_POWER_BITS if base else _LARGEST_SYMBOLIC_EXPONENT):
            return f"a power with exponent {exponent[:20]}"
    return None


def _exponent(compact: str, start: int) -> str:
    """The exponent that begins at `start`: one operand, and with it whatever that is raised to (`9^9^9` is 9^(9^9))."""
    end = _operand_end(compact, start)
    operand = compact[start:end]
    return f"{operand}^{_exponent(compact, end + 1)}" if compact[end : end + 1] == "^" else operand


def _operand_end(compact: str, start: int) -> int:
    """Position behind a braced or parenthesised group, a number, or a single character."""
    if compact[start : start + 1] in ("{", "("):
        depth = 0
        for position in range(start, len(compact)):
            depth += (compact[position] in "{(") - (compact[position] in "})")
            if depth == 0:
                return position + 1
        return len(compact)
    number = _SIGNED_NUMBER.match(compact, start)
    return number.end() if number else start + 1


def _magnitude(expression: str) -> float:
    """An upper bound of the size of a short expression: the product of its numbers, each raised to its exponent."""
    size, position = 1.0, 0
    while (number := _DIGITS.search(expression, position)) is not None:
        position = number.end()
        log = _log2(number[0])
        if expression[position : position + 1] == "^":
            inner = _exponent(expression, position + 1)
            position += 1 + len(inner)
            log *= _magnitude(inner)
        size *= math.exp2(min(log, 1000.0))
        if size > 1e9:
            return size
    return size


def _log2(digits: str) -> float:
    value = digits.strip(".")
    return math.log2(max(float(value), 1.0)) if value and value.count(".") < 2 else 0.0


def _exponent_nesting(compact: str) -> int:
    """Longest chain of powers of powers: 2 for `2^{3^4}`; a chain without braces (`9^9^9`) nests as well."""
    chained = max((run.count("^") for run in re.findall(r"(?:[\w.]+\^)+", compact)), default=0)
    deepest = 0
    open_exponents: list[bool] = []
    previous = ""
    for character in compact:
        if character in "{(":
            open_exponents.append(previous == "^")
        elif character in "})" and open_exponents:
            open_exponents.pop()
        elif character == "^":
            deepest = max(deepest, 1 + sum(open_exponents))
        previous = character
    return max(chained, deepest)
