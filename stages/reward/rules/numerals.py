r"""Numbers in other scripts and in words: full-width forms as LaTeX in ASCII, Chinese and English numerals as integers.

What has no entry stays as it is, and is no formula for the rules that follow: a sign is never dropped.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from fractions import Fraction
from typing import Final


def split(words: str) -> frozenset[str]:
    """Return the words of a text, as a set."""
    return frozenset(words.split())


CHINESE_NUMERALS: Final = "零〇一二三四五六七八九两十百千万亿"

_CHINESE_DIGITS: Final = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_UNITS: Final = {"十": 10, "百": 100, "千": 1000}
_CHINESE_GROUPS: Final = {"万": 10**4, "亿": 10**8}

_ONES_AND_TEENS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_SMALL: Final = {word: value for value, word in enumerate(_ONES_AND_TEENS.split())}
_TENS: Final = dict(
    zip(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], range(20, 100, 10), strict=True)
)
_LARGE: Final = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
INTEGER_WORDS: Final = (*_SMALL, *_TENS, *_LARGE, "hundred", "dozen")


def chinese_number(text: str) -> int | None:
    """Return the integer that Chinese numerals write: 三百二十一 is 321, 十二 is 12, 两万 is 20,000. None for anything else."""
    if not text or set(text) - {*_CHINESE_DIGITS, *_CHINESE_UNITS, *_CHINESE_GROUPS}:
        return None
    if len(text) > 1 and not set(text) - set(_CHINESE_DIGITS):  # digit by digit: 二〇二四
        return int("".join(str(_CHINESE_DIGITS[sign]) for sign in text))
    total = group = digit = 0
    ceiling, unit_ceiling = 10**12, 10**4
    for sign in text:
        if sign in _CHINESE_DIGITS:
            if digit:
                return None
            digit = _CHINESE_DIGITS[sign]
        elif sign in _CHINESE_UNITS:
            unit = _CHINESE_UNITS[sign]
            if unit >= unit_ceiling or (digit == 0 and unit != 10):
                return None
            group, digit, unit_ceiling = group + (digit or 1) * unit, 0, unit
        else:
            scale = _CHINESE_GROUPS[sign]
            if scale >= ceiling or not group + digit:
                return None
            total, group, digit, ceiling, unit_ceiling = total + (group + digit) * scale, 0, 0, scale, 10**4
    return total + group + digit


def english_number(text: str) -> int | None:
    """Return the integer that English words write: seventy-two, two hundred and five, six dozen. None for anything else."""
    words = [word for word in re.split(r"[\s-]+", text.strip().lower()) if word]
    if not words or words[-1] == "and":
        return None
    total = group = 0
    room = 10**3  # what a word may still add to the group: one hundred, then tens, then ones
    ceiling = 10**15
    for place, word in enumerate(words):
        if word in _SMALL or word in _TENS:
            value, limit = (_SMALL[word], 10 if _SMALL[word] < 10 else 100) if word in _SMALL else (_TENS[word], 100)
            if limit > room or (value == 0 and len(words) > 1):
                return None
            group, room = group + value, 10 if word in _TENS else 1
        elif word == "hundred" and 0 < group < 10:
            group, room = group * 100, 100
        elif word in _LARGE and group > 0 and _LARGE[word] < ceiling:
            total, group, room, ceiling = total + group * _LARGE[word], 0, 10**3, _LARGE[word]
        elif word == "dozen" and place == len(words) - 1 and (group or words[:-1] == ["a"]):
            return (total + (group or 1)) * 12
        elif not (word == "and" and ((room == 100 and group) or (room == 10**3 and total))) and not (
            word == "a" and words[1:] == ["dozen"]
        ):
            return None
    return total + group


CURRENCIES: Final = "".join(
    sign for sign in map(chr, range(0x20, 0x20D0)) if unicodedata.category(sign) == "Sc" and sign != "$"
)
"""Currency signs but for the dollar, which LaTeX has a use for."""

_COMMANDS: Final = {
    pair[0]: pair[1:]
    for pair in split(
        "×times ⨯times ·cdot ⋅cdot ∙cdot ±pm ∓mp ≤le ⩽le ≥ge ⩾ge ≠ne ≈approx ≅cong ≡equiv ∞infty ∪cup ∩cap ∈in "
        "∅emptyset ∀forall ∃exists ∖setminus ⊂subset ⊆subseteq →to …ldots ⋯cdots ∑sum ∏prod ∫int ⌊lfloor ⌋rfloor "
        "⌈lceil ⌉rceil ϕphi ℝmathbb{R} ℤmathbb{Z} ℕmathbb{N} ℚmathbb{Q} ℂmathbb{C}"
    )
}
"""Signs, each with the command that LaTeX has for it."""
_GREEK: Final = split(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi "
    "chi psi omega"
)
_PLAIN: Final = dict(zip("−‐‑﹣÷∕⁄∶∣、﹐٬٫٪。｡￥￡￠￦", "----///:|,,,.%..¥£¢₩", strict=True)) | {
    "\u3000": " ",
    **dict.fromkeys("°º", r"^\circ "),
    "℃": r"^\circ C",
    "℉": r"^\circ F",
    "～": " \N{TILDE OPERATOR} ",  # a range: in ASCII it would be LaTeX's space
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("‘’", "'"),
}
_INVISIBLE: Final = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad"))
_SUPERSCRIPTS: Final = {unicodedata.normalize("NFKC", sign).replace("−", "-"): sign for sign in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ"}
_SUBSCRIPTS: Final = {unicodedata.normalize("NFKC", sign).replace("−", "-"): sign for sign in "₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ"}
_RAISED: Final = re.compile(f"[{''.join(_SUPERSCRIPTS.values())}]+")
_LOWERED: Final = re.compile(f"[{''.join(_SUBSCRIPTS.values())}]+")
_VULGAR: Final = re.compile("[¼½¾⅐-⅞↉]")
_DASH_SIGN: Final = re.compile(r"^(\s*[$£€¥]?)[–—](?=\s?[\d.$£€¥\\])")
_ROOT: Final = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+))")
_ROOTS: Final = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


@functools.lru_cache(maxsize=2**14)
def to_latin(text: str) -> str:
    r"""Return `text` in ASCII where it has a spelling there: `１２` is `12`, `3²` is `3^{2}`, `½` is `\frac{1}{2}`."""
    if text.isascii():
        return text
    text = text.translate(_INVISIBLE)
    text = _DASH_SIGN.sub(r"\1-", text)
    text = _RAISED.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0]).replace('−', '-')}}}", text)
    text = _LOWERED.sub(lambda run: f"_{{{unicodedata.normalize('NFKC', run[0]).replace('−', '-')}}}", text)
    text = _VULGAR.sub(_fraction, text)
    text = "".join(map(_latin_sign, text))
    for _ in range(3):  # a root of a root
        text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3] or m[4] or ''}}}", text)
    return text


def _fraction(sign: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(sign[0])).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@functools.lru_cache(maxsize=2**12)
def _latin_sign(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in _PLAIN:
        return _PLAIN[sign]
    if sign in _COMMANDS:
        return rf"\{_COMMANDS[sign]} "
    if (digit := unicodedata.decimal(sign, None)) is not None:
        return str(digit)
    name = unicodedata.name(sign, "").lower()
    if 0xFF01 <= ord(sign) <= 0xFF5D or "MATHEMATICAL" in name.upper():
        plain = unicodedata.normalize("NFKC", sign)
        return plain if plain.isascii() else _latin_sign(plain) if plain != sign else sign
    if name.startswith("greek ") and name.rpartition(" ")[2] in _GREEK and " letter " in name:
        letter = name.rpartition(" ")[2]
        return rf"\{letter.capitalize() if 'capital' in name else letter} "
    if sign.isspace():
        return " "
    return sign
