"""The fast path: answers compared as exact numbers or equal strings, without sympy and without a process.

It settles all of GSM8K and the arithmetic world, and never contradicts mathematics: what it cannot decide it leaves open.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

__all__ = ["Number", "canonical", "compare_exactly", "normalise_text", "read_number"]

_LONGEST: Final = 512
_MOST_DIGITS: Final = 400

_LATEX_NOISE: Final = re.compile(r"\\[!,;:> ]|\\left|\\right|\\displaystyle|\\[()\[\]]|~")
_TEXT_COMMAND: Final = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textnormal|textit|operatorname)\s?\{([^{}]*)\}")
_BLANK: Final = re.compile(r"(?:\\q?quad|\s)+")
_LIST_SEPARATOR: Final = re.compile(r";|,? and\b")
_INTEGER: Final = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+|\d+)"
_TIMES_TEN: Final = r"\s*(?:\\times|\\cdot|[*×])\s*10\s*(?:\^|\*\*)\s*"
_NUMBER: Final = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:[$€£¥₹]\s*)?(?P<inner>[-+]?)
    (?: (?P<mixed>\d+)?\s*\\frac\s*\{{(?P<top>-?\d+)\}}\s*\{{(?P<bottom>\d+)\}} | \\frac(?P<one>\d)(?P<two>\d)
      | (?:(?P<and>\d+)\s+(?=[1-9]))?(?P<a>\d+)\s*/\s*(?P<b>\d+)
      | (?P<whole>{_INTEGER})?(?P<part>\.\d*)?(?:[eE](?P<e>[-+]?\d{{1,3}})|{_TIMES_TEN}\{{?(?P<ten>[-+]?\d{{1,3}})\}}?)? )
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_DECIMAL_COMMA: Final = re.compile(r"[-+]?\d+,\d+", re.ASCII)
_PERCENT: Final = re.compile(r"\s*(?:%|percent|percentage|pct)", re.IGNORECASE)
_WORDS: Final = re.compile(r"(?:\s+(?:[A-Za-z]{2,}|[€£¥]|\$))(?:\s+[A-Za-z]+){0,3}(?:\^?\{?[23²³]\}?)?")
_SYMBOLS: Final = re.compile(
    r"\s*(?:cm|mm|km|kg|mg|ml|mL|lbs?|oz|ft|mph|hrs?|min|secs?|m|g|°[CF]?|\^\\circ|[$€£¥])(?:\^?\{?[23²³]\}?)?"
)
_CHINESE_UNIT: Final = re.compile(r"\s*[一-鿿]{1,4}")
_SCALES: Final = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHINESE_SCALES: Final = "十百千万亿半"
# Words that join numbers: "17 or 18" is not 17.
_JOINING: Final = {
    "and",
    "or",
    "to",
    "by",
    "plus",
    "minus",
    "times",
    "over",
    "not",
    "mod",
    "of",
    "but",
    "half",
    "point",
}


@dataclass(frozen=True)
class Number:
    """A rational number as written: its exact value, and whether `%` or a decimal point stood there."""

    value: Fraction
    percent: bool
    decimal: bool


def compare_exactly(gold: str, answer: str) -> bool | None:
    """Whether `answer` equals `gold`; None where that takes more than rational numbers and equal strings.

    Policy: units, currency signs and thousands separators do not count; `25%` equals both `25` and `0.25`; a number with a
    decimal point may differ from the gold by rounding in the seventh decimal place; `1,22` is a decimal beside `1.22`, and a
    list may be joined by `;` or "and".
    """
    if len(gold) > _LONGEST or len(answer) > _LONGEST:
        return None
    expected, stated = read_number(gold), read_number(answer)
    expected, stated = expected or _with_comma(gold, stated), stated or _with_comma(answer, expected)
    if expected is not None and stated is not None:
        return any(_same(x, y, expected.decimal or stated.decimal) for x, y in _readings(expected, stated))
    if normalise_text(gold) == normalise_text(answer) != "":
        return True
    letters = _letters(answer)
    if letters and (expected is not None or _letters(gold) not in ("", letters)):
        return False
    return None


def _letters(answer: str) -> str:
    """The letters of an answer of plain words, sorted: `ab` equals `ba` if it is a product, `odd` never equals `even`."""
    text = _TEXT_COMMAND.sub(r"\1", answer).strip("$.() ").replace(" ", "")
    return "".join(sorted(text)) if text.isalpha() else ""


def canonical(answer: str) -> str:
    """One spelling for equal answers, for votes and for people: `$1,000.50 dollars` and `1000.5` are both `1000.5`."""
    number = read_number(answer) if len(answer) <= _LONGEST else None
    if number is None:
        return normalise_text(answer[:_LONGEST])
    return f"{_decimal(number.value)}{'%' if number.percent else ''}"


def normalise_text(answer: str) -> str:
    r"""Spelling without meaning removed: spaces, `\left`, `\text{}`, `\dfrac`, dollars, the full stop; case of words."""
    text = _TEXT_COMMAND.sub(r" \1 ", _LATEX_NOISE.sub("", answer)).replace("$", "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("\\%", "%").replace("−", "-")
    text = _LIST_SEPARATOR.sub(",", _BLANK.sub(" ", text))
    text = re.sub(r"\s+", "", text).strip().removesuffix(".")
    return text.lower() if len(text) > 1 and text.isalpha() else text


@functools.lru_cache(maxsize=2**14)  # the gold answer again and again, and most answers more than once
def read_number(answer: str) -> Number | None:
    """The rational number that `answer` is, with its unit or currency aside; None for anything else."""
    text = _LATEX_NOISE.sub("", answer[:_LONGEST]).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _TEXT_COMMAND.sub(r" \1", text.replace("−", "-").replace("dfrac", "frac").replace("tfrac", "frac"))
    text = text.strip().strip("*").rstrip("\\").removesuffix(".").strip()
    if text.startswith("$") and text.endswith("$") and len(text) > 2:
        text = text[1:-1].strip()
    if sum(map(str.isdigit, text)) > _MOST_DIGITS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    value = _value(match)
    rest = match["rest"]
    percent = _PERCENT.fullmatch(rest) is not None
    scale = 1 if percent else _unit_scale(rest)
    if value is None or scale is None:
        return None
    negative = "-" in (match["sign"], match["inner"])
    return Number((-value if negative else value) * scale, percent, match["part"] is not None)


def _with_comma(text: str, other: Number | None) -> Number | None:
    """`1,22` beside a number with a decimal point: a decimal comma. Beside anything else it may be a pair."""
    if other is None or not other.decimal:
        return None
    return read_number(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text.strip("$ ")) else None


def _value(match: re.Match[str]) -> Fraction | None:
    for units, top, bottom in (("mixed", "top", "bottom"), (None, "one", "two"), ("and", "a", "b")):
        if match[top] is not None:
            return _fraction(match[units] if units else None, int(match[top]), int(match[bottom]))
    digits = (match["whole"] or "").replace(",", "").replace(" ", "") + (match["part"] or "")
    if not any(map(str.isdigit, digits)) or not digits.isascii():
        return None
    return Fraction(f"{digits.rstrip('.') or '0'}e{match['e'] or match['ten'] or 0}")


def _fraction(units: str | None, top: int, bottom: int) -> Fraction | None:
    """A fraction, or a mixed number: `2 1/2` is 5/2. With an improper fraction it would be a product: left open."""
    if bottom == 0 or (units is not None and not 0 <= top < bottom):
        return None
    return int(units or 0) + Fraction(top, bottom)


def _unit_scale(rest: str) -> int | None:
    """What a unit multiplies by: 1 for none and for most, 1000 for `thousand`; None where `rest` is not a unit."""
    if not rest.strip():
        return 1
    words = rest.split()
    if words[0].lower() in _SCALES:
        inner = _unit_scale(rest.split(words[0], 1)[1])
        return None if inner is None else inner * _SCALES[words[0].lower()]
    if _JOINING & {word.lower() for word in words}:
        return None
    if _CHINESE_UNIT.fullmatch(rest):
        return None if any(scale in rest for scale in _CHINESE_SCALES) else 1
    return 1 if _WORDS.fullmatch(rest) or _SYMBOLS.fullmatch(rest) else None


def _readings(expected: Number, stated: Number) -> list[tuple[Fraction, Fraction]]:
    same = [(expected.value, stated.value)]
    if expected.percent and not stated.percent:
        same.append((expected.value / 100, stated.value))
    if stated.percent and not expected.percent:
        same.append((expected.value, stated.value / 100))
    return same


def _same(x: Fraction, y: Fraction, rounded: bool) -> bool:
    """Equal, or apart by no more than floating point leaves (0.1 + 0.2): half of the sixth place, absolute and relative."""
    if x == y:
        return True
    gap = abs(x - y)
    return rounded and gap < Fraction(1, 2_000_000) and gap < max(abs(x), abs(y)) / 1_000_000


def _decimal(value: Fraction) -> str:
    """The shortest exact spelling: an integer, a terminating decimal of at most 12 places, or `p/q`."""
    if value.denominator == 1:
        return str(value.numerator)
    for places in range(1, 13):
        scaled = value * 10**places
        if scaled.denominator == 1:
            sign, digits = "-" if value < 0 else "", str(abs(scaled.numerator)).rjust(places + 1, "0")
            return f"{sign}{digits[:-places]}.{digits[-places:]}"
    return f"{value.numerator}/{value.denominator}"
