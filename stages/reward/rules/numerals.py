"""Integers in words: Chinese and English."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["CHINESE_NUMERALS", "INTEGER_WORDS", "chinese_number", "english_number"]

CHINESE_NUMERALS: Final = "零〇一二三四五六七八九两十百千万亿"

_CHINESE_DIGITS: Final = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_UNITS: Final = {"十": 10, "百": 100, "千": 1000}
_CHINESE_GROUPS: Final = {"万": 10**4, "亿": 10**8}

_ONES_AND_TEENS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_SMALL: Final = {word: value for value, word in enumerate(_ONES_AND_TEENS.split())}
_TENS: Final = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
_LARGE: Final = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
INTEGER_WORDS: Final = (*_SMALL, *_TENS, *_LARGE, "hundred", "dozen")


def chinese_number(text: str) -> int | None:
    """The integer that Chinese numerals write: 三百二十一 is 321, 十二 is 12, 两万 is 20,000. None for anything else."""
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
    """The integer that English words write: seventy-two, two hundred and five, six dozen. None for anything else."""
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
