"""The fast path: answers compared as exact numbers or equal strings, without sympy and without a process.

It settles all of GSM8K and the arithmetic world. What it settles is the mathematics of rational numbers, but for the policies
of `compare_exactly` (units, percent, rounding in the seventh place); what it cannot decide it leaves open.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from stages.reward.rules.numerals import (
    CHINESE_NUMERALS,
    CURRENCIES,
    INTEGER_WORDS,
    chinese_number,
    english_number,
    to_latin,
)
from stages.reward.rules.units import read_unit

_LONGEST: Final = 512
_MOST_DIGITS: Final = 400

_SPACES: Final = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad|\\(?:hspace|hskip|[vh]?phantom)\s?\{[^{}]*\}")
_LATEX_NOISE: Final = re.compile(r"\\!|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle|(?<!\\)\\[()\[\]]")
_STYLE: Final = re.compile(
    r"\\(?:boldsymbol|mathbf|mathbb(?=\{\d)|bm|pmb|mathit|mathsf|mathtt|emph|underline|ensuremath|mathbin|mathord|boxed|fbox|framebox"
    r"|textcolor\s?\{[a-z]+\}|colorbox\s?\{[a-z]+\}|color\s?\{[a-z]+\}|bf|rm|it|large|Large|LARGE|huge|Huge|tiny|small|normalsize|footnotesize|textstyle|displaystyle|mathstrut)(?![A-Za-z])\s*"
)
_TEXT_COMMAND: Final = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|textnormal|textit|textrm|textsf|texttt|operatorname|hbox)\s?\{([^{}]*)\}"
)
_LEAD: Final = re.compile(
    r"(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|result|value)(?:\s+(?:is|equals))?\s*[:=]?\s*"
    r"(?:equal to\s+|just\s+)?(?=\S)",
    re.IGNORECASE,
)
_SPECIAL_TOKEN: Final = re.compile(r"<\|[^|<>\s]{1,32}\|>|</?s>|<(?:eos|end_of_turn)>")
_THOUSANDS: Final = re.compile(r",(?:\s*\\!\s*|\s*\{\}\s*)(?=\d{3})|\{,\}")
_DELIMITED: Final = re.compile(r"\$(\S(?:[^$]*[^\s$])?)\$(?!\d)")
_DOUBLED: Final = re.compile(
    r"(?<!\\)\\\\(?=(?:dfrac|tfrac|le|ge|leq|geq|frac|sqrt|boxed|text|begin|end|cdot|infty|in|cup|times|left|right|cap|pi)(?![A-Za-z]))"
)
_BLANK: Final = re.compile(r"(?:\\q?quad|\s)+")
_BEHIND_COMMAND: Final = re.compile(r"(\\[A-Za-z]+)(?: +|\{\})+(?=[A-Za-z])")
_LIST_SEPARATOR: Final = re.compile(r";|,? and\b")
_INTEGER: Final = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]+\d{3})+|\d+)"
_TIMES_TEN: Final = r"\s*(?:\\times|\\cdot|[*×])\s*10\s*(?:\^|\*\*)\s*"
_NUMBER: Final = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:(?P<money>[${CURRENCIES}])\s*)?(?P<inner>[-+]?)
    (?: (?P<mixed>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}} | \\frac\s?(?P<one>\d)\s?(?P<two>\d)
      | (?:(?P<and>\d+)\s+(?=[1-9]))?(?P<a>\d+)\s*/\s*(?P<b>\d+)
      | (?P<base>\d{{1,20}})\s?(?:\^|\*\*)\s?(?:\{{\s*(?P<up>[-+]?\d{{1,3}})\s*\}}|(?P<to>-?\d{{1,3}}))
      | (?P<fixed>\d*)\.(?P<before>\d*)\\(?:overline|bar)\s?\{{(?P<repeated>\d{{1,20}})\}}
      | (?P<whole>{_INTEGER})?(?P<part>\.\d*)?(?:[eE](?P<e>[-+]?\d{{1,3}})|{_TIMES_TEN}\{{?(?P<ten>[-+]?\d{{1,3}})\}}?)? )
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_DECIMAL_COMMA: Final = re.compile(r"[-+]?\d+,\d+", re.ASCII)
_NUMERAL: Final = "|".join(sorted(INTEGER_WORDS, key=len, reverse=True))
_NUMERAL_WORDS: Final = re.compile(
    rf"(?:a\s+(?=dozen))?(?:{_NUMERAL})(?:(?:[\s-]+|\s+and\s+)(?:{_NUMERAL}))*(?![\w-])", re.IGNORECASE
)
_TRUTH: Final = {"yes": True, "true": True, "no": False, "false": False}
_TIME: Final = re.compile(
    r"(?P<hour>[01]?\d|2[0-3]):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?:\s*(?P<half>[ap])\.?\s?m\.?)?",
    re.IGNORECASE | re.ASCII,
)
_HALF_A_DAY: Final = 12 * 3600
_ALL_DOUBLED: Final = re.compile(r"(?:[^\\]|(?:\\\\)+)*")
_WORD_AND_NUMBER: Final = re.compile(r"[A-Za-z]{4,}\d*", re.ASCII)
_CHINESE_PERCENT: Final = re.compile(r"百分之(.+)")


@dataclass(frozen=True)
class Number:
    """A rational number as written: its exact value, and whether `%` or a decimal point stood there."""

    value: Fraction
    percent: bool
    decimal: bool
    unit: str | None = None
    """Where it is a known one: metres are not centimetres."""


def compare_exactly(gold: str, answer: str) -> bool | None:
    """Return whether `answer` equals `gold`; None where that takes more than rational numbers and equal strings.

    Policy: units, currency signs and thousands separators do not count; `25%` equals both `25` and `0.25`; a number with a
    decimal point may differ from the gold by rounding in the seventh decimal place; `1,22` is a decimal next to `1.22`, and a
    list may be joined by `;` or "and".
    """
    if len(gold) > _LONGEST or len(answer) > _LONGEST:
        return None
    expected, stated = read_number(gold), read_number(answer)
    expected, stated = expected or _with_comma(gold, stated), stated or _with_comma(answer, expected)
    if expected is not None and stated is not None:
        if expected.unit and stated.unit and expected.unit != stated.unit:
            return False
        return any(_same(x, y, expected.decimal or stated.decimal) for x, y in _readings(expected, stated))
    spelling, wanted = normalise_text(answer), normalise_text(gold)
    if spelling == "nan":
        return False
    if wanted == spelling != "":
        return True
    if wanted in _TRUTH and spelling in _TRUTH:
        return _TRUTH[wanted] == _TRUTH[spelling]
    if (times := _same_time(gold, answer)) is not None:
        return times
    letters = _letters(answer)
    if letters and (expected is not None or _letters(gold) not in ("", letters)):
        return False
    return None


def _same_time(gold: str, answer: str) -> bool | None:
    """Return whether two times are one (`20:34`, `8:34 p.m.`); None where one is no time, or both may be ratios."""
    times = [_TIME.fullmatch(undressed(text)) if ":" in text else None for text in (gold, answer)]
    if None in times:
        return None
    seconds = [
        (int(time["hour"]) % (12 if time["half"] else 24) + 12 * (time["half"] in ("p", "P"))) * 3600
        + int(time["minute"]) * 60
        + int(time["second"] or 0)
        for time in times
        if time
    ]
    if seconds[0] == seconds[1]:
        return True
    # 8:34 may be meant for 8:34 p.m., and 2:10 for the ratio 1:05.
    decided = any(time["half"] for time in times if time) and (seconds[0] - seconds[1]) % _HALF_A_DAY
    return False if decided or all(time["half"] for time in times if time) else None


def _letters(answer: str) -> str:
    """Return the sorted letters of plain words: `ab` equals `ba` if it is a product, `odd` never equals `even`."""
    text = re.sub(r"[\s.()-]", "", undressed(answer))
    return "".join(sorted(text)) if text.isalpha() else ""


def canonical(answer: str) -> str:
    """Return one spelling for equal answers, for votes and for people: `$1,000.50 dollars` and `1000.5` are both `1000.5`."""
    number = read_number(answer) if len(answer) <= _LONGEST else None
    if number is None:
        return normalise_text(answer[:_LONGEST])
    return f"{_decimal(number.value)}{'%' if number.percent else ''}"


def normalise_text(answer: str) -> str:
    r"""Return the spelling without what means nothing: spaces, `\left`, `\text{}`, dollars, a full stop, the case of words."""
    text = _SPACES.sub(
        " ", _LATEX_NOISE.sub("", to_latin(_SPECIAL_TOKEN.sub("", answer)).replace("\\$", "").replace("{,}", ","))
    )
    text = _STYLE.sub("", _TEXT_COMMAND.sub(r" \1 ", text)).replace("$", "").strip("*` ").replace("**", "^")
    text = _DOUBLED.sub(r"\\", text).replace("dfrac", "frac").replace("tfrac", "frac").replace("\\%", "%")
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = _LIST_SEPARATOR.sub(",", _BLANK.sub(" ", text)).strip()
    # Spaces mean nothing but between digits (3 4 is not 34) and behind a command: \pi r is not \pir.
    text = _BEHIND_COMMAND.sub(r"\1{}", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text).replace("{}", " ").strip().removesuffix(".")
    text = text[1:-1] if re.fullmatch(r"\{[^{}]*\}", text) else text
    return text.lower() if (len(text) > 1 and text.isalpha()) or _WORD_AND_NUMBER.fullmatch(text) else text


@functools.lru_cache(maxsize=2**14)  # the gold answer again and again, and most answers more than once
def read_number(answer: str) -> Number | None:
    """Return the rational number that `answer` is, with its unit or currency aside; None for anything else."""
    if len(answer) > _LONGEST:
        return None
    text = undressed(answer)
    if (share := _CHINESE_PERCENT.fullmatch(text)) is not None:
        inner = read_number(share[1])
        return None if inner is None or inner.unit or inner.percent else Number(inner.value, True, inner.decimal)
    if (written := _in_words(text)) is not None:
        return written
    if len(text) > _LONGEST or max(map(len, re.findall(r"\d+", text)), default=0) > _MOST_DIGITS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    value, unit = _value(match), read_unit(match["rest"])
    if value is None or unit is None or (match["base"] and match["rest"].startswith(("^", "*"))):
        return None
    value = -value if "-" in (match["sign"], match["inner"]) else value
    name = unit.name or (read_unit(match["money"]) or unit).name if match["money"] else unit.name
    return Number(value * unit.scale, unit.percent, match["part"] is not None or match["repeated"] is not None, name)


def undressed(answer: str) -> str:
    r"""Return an answer without the marks around it: `\(`, `\text{}`, `**`, backticks, quotes, `The answer is`, a full stop."""
    answer = _SPECIAL_TOKEN.sub("", answer)
    if _DOUBLED.search(answer) and _ALL_DOUBLED.fullmatch(
        answer
    ):  # escaped once too often, line ends of a matrix included
        answer = answer.replace(r"\\", "\\")
    text = _THOUSANDS.sub(",", to_latin(answer))
    text = (
        text.replace(r"\"", '"').replace(r"\%", "%").replace(r"\$", "$\N{WORD JOINER}")
    )  # a dollar that delimits nothing
    text = _DELIMITED.sub(r"\1", _DOUBLED.sub(r"\\", text)).replace("\N{WORD JOINER}", "")
    text = _LATEX_NOISE.sub("", _SPACES.sub(" ", _STYLE.sub("", text)))
    text = _TEXT_COMMAND.sub(r" \1", text.replace("dfrac", "frac").replace("tfrac", "frac"))
    for _ in range(4):
        core = text.strip().rstrip("\\").strip("*` ")
        core = core.strip("_") if core.startswith("_") and core.endswith("_") else core
        core = core if core.endswith("..") else core.removesuffix(".").strip()
        core = core[1:-1] if len(core) > 2 and core[0] == core[-1] and core[0] in "\"'" else core
        core = core[1:-1] if core[:1] + core[-1:] in ("$$", "{}") and len(core) > 2 and "}" not in core[1:-1] else core
        core = _LEAD.sub("", core, count=1) if _LEAD.match(core) else core
        if core == text:
            break
        text = core
    return text


def _in_words(text: str) -> Number | None:
    """Return a number in Chinese or English words: 十二个, `seventy-two`, `six dozen eggs`."""
    numerals = len(text) - len(text.lstrip(CHINESE_NUMERALS))
    if numerals:
        value, rest = chinese_number(text[:numerals]), text[numerals:]
    else:
        words = _NUMERAL_WORDS.match(text)
        value, rest = (english_number(words[0]), text[words.end() :]) if words else (None, "")
    unit = read_unit(rest) if value is not None else None
    return (
        None if value is None or unit is None else Number(Fraction(value * unit.scale), unit.percent, False, unit.name)
    )


def _with_comma(text: str, other: Number | None) -> Number | None:
    """Read `1,22` with a decimal comma, if the other number has a decimal point; otherwise it may be a pair."""
    if other is None or not other.decimal:
        return None
    return read_number(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text.strip("$ ")) else None


def _value(match: re.Match[str]) -> Fraction | None:
    for units, top, bottom in (("mixed", "top", "bottom"), (None, "one", "two"), ("and", "a", "b")):
        if match[top] is not None:
            return _fraction(match[units] if units else None, int(match[top]), int(match[bottom]))
    if match["base"] is not None:
        return _power(int(match["base"]), int(match["up"] or match["to"]))
    if match["repeated"] is not None:
        return _repeating(match["fixed"], match["before"], match["repeated"])
    digits = re.sub("[, ]", "", match["whole"] or "") + (match["part"] or "")
    if not any(map(str.isdigit, digits)) or not digits.isascii():
        return None
    return Fraction(f"{digits.rstrip('.') or '0'}e{match['e'] or match['ten'] or 0}")


def _power(base: int, exponent: int) -> Fraction | None:
    """Return a power of at most 400 digits; 0 to the power of 0 and below is left open."""
    if (base == 0 and exponent <= 0) or len(str(base)) * abs(exponent) > _MOST_DIGITS:
        return None
    return Fraction(base) ** exponent


def _repeating(fixed: str, before: str, repeated: str) -> Fraction:
    r"""Return the value of a repeating decimal: `0.1\overline{6}` is 1/6."""
    period: Fraction = Fraction(int(repeated), 10 ** len(repeated) - 1) / 10 ** len(before)
    return Fraction(f"{fixed or '0'}.{before or '0'}") + period


def _fraction(units: str | None, top: int, bottom: int) -> Fraction | None:
    """Return a fraction, or a mixed number: `2 1/2` is 5/2. With an improper fraction it would be a product: left open."""
    if bottom == 0 or (units is not None and not 0 <= top < bottom):
        return None
    return int(units or 0) + Fraction(top, bottom)


def _readings(expected: Number, stated: Number) -> list[tuple[Fraction, Fraction]]:
    same = [(expected.value, stated.value)]
    if expected.percent and not stated.percent:
        same.append((expected.value / 100, stated.value))
    if stated.percent and not expected.percent:
        same.append((expected.value, stated.value / 100))
    return same


def _same(x: Fraction, y: Fraction, rounded: bool) -> bool:
    """Return whether numbers are equal, or as near as floating point leaves them (0.1 + 0.2): half of the sixth place."""
    if x == y:
        return True
    gap = abs(x - y)
    return rounded and gap < Fraction(1, 2_000_000) and gap < max(abs(x), abs(y)) / 1_000_000


def _decimal(value: Fraction) -> str:
    """Return the shortest exact spelling: an integer, a terminating decimal of at most 12 places, or `p/q`."""
    if value.denominator == 1:
        return str(value.numerator)
    for places in range(1, 13):
        scaled = value * 10**places
        if scaled.denominator == 1:
            sign, digits = "-" if value < 0 else "", str(abs(scaled.numerator)).rjust(places + 1, "0")
            return f"{sign}{digits[:-places]}.{digits[-places:]}"
    return f"{value.numerator}/{value.denominator}"
