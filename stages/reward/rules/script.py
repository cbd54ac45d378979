r"""One script for formulas: full-width forms, digits of other scripts and mathematical signs, spelled as LaTeX in ASCII.

What has no entry stays as it is, and is no formula for the rules that follow: a sign is never dropped.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from fractions import Fraction
from typing import Final

from stages.reward.rules.vocabulary import split

__all__ = ["CURRENCIES", "to_latin"]

CURRENCIES: Final = "".join(
    sign for sign in map(chr, range(0x20, 0x20D0)) if unicodedata.category(sign) == "Sc" and sign != "$"
)
"""Currency signs but for the dollar, which LaTeX has a use for."""

_COMMANDS: Final = {
    "×": "times",
    "⨯": "times",
    "·": "cdot",
    "⋅": "cdot",
    "∙": "cdot",
    "±": "pm",
    "∓": "mp",
    "≤": "le",
    "⩽": "le",
    "≥": "ge",
    "⩾": "ge",
    "≠": "ne",
    "≈": "approx",
    "≅": "cong",
    "≡": "equiv",
    "∞": "infty",
    "∪": "cup",
    "∩": "cap",
    "∈": "in",
    "∅": "emptyset",
    "∀": "forall",
    "∃": "exists",
    "∖": "setminus",
    "⊂": "subset",
    "⊆": "subseteq",
    "→": "to",
    "…": "ldots",
    "⋯": "cdots",
    "∑": "sum",
    "∏": "prod",
    "∫": "int",
    "⌊": "lfloor",
    "⌋": "rfloor",
    "⌈": "lceil",
    "⌉": "rceil",
    "ϕ": "phi",
    "ℝ": "mathbb{R}",
    "ℤ": "mathbb{Z}",
    "ℕ": "mathbb{N}",
    "ℚ": "mathbb{Q}",
    "ℂ": "mathbb{C}",
}
_GREEK: Final = split(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi "
    "chi psi omega"
)
_PLAIN: Final = {
    "\u3000": " ",
    "−": "-",
    "‐": "-",
    "‑": "-",
    "﹣": "-",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "∶": ":",
    "∣": "|",
    "、": ",",
    "﹐": ",",
    "٬": ",",
    "٫": ".",
    "٪": "%",
    "。": ".",
    "｡": ".",
    "￥": "¥",
    "￡": "£",
    "￠": "¢",
    "￦": "₩",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "℃": r"^\circ C",
    "℉": r"^\circ F",
    "～": " \N{TILDE OPERATOR} ",  # a range: in ASCII it would be LaTeX's space
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
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
    r"""`text` in ASCII where it has a spelling there: `１２` is `12`, `3²` is `3^{2}`, `½` is `\frac{1}{2}`."""
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
