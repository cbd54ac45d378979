"""What may stand behind a number without changing it: units, currencies, things that are counted, and words of prose.

A word of mathematics, a number in words, a letter that may be a variable, and a word that takes the number back are none of
these: then the number is not the answer.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

from stages.reward.rules.numerals import CURRENCIES, split

_SAME: Final = (
    "m meter meters metre metres; cm centimeter centimeters centimetre centimetres; mm millimeter millimeters millimetre "
    "millimetres; km kilometer kilometers kilometre kilometres; inch inches; ft foot feet; yd yds yard yards; mi mile "
    "miles; g gram grams; kg kilogram kilograms kilo kilos; mg milligram milligrams; oz ounce ounces; ton tons tonne "
    "tonnes; s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks wk wks; month "
    "months; year years yr yrs; ml mL milliliter milliliters millilitre millilitres; L liter liters litre litres; gal "
    "gallon gallons; quart quarts qt; pint pints pt; dollar dollars usd USD $; cent cents ¢; euro euros EUR €; mph; km/h "
    "kmh kph; m/s; Hz; W watt watts; J joule joules; N newton newtons"
)
"""Spellings of units; the first of each is its name."""
UNIT_OF: Final = {word: same.split()[0] for same in _SAME.split(";") for word in same.split()}
NUMBER_WORDS: Final = split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion "
    "trillion half halves third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth "
    "ninths tenth tenths hundredth hundredths thousandth thousandths quarter quarters dozen dozens score gross "
    "hundreds thousands millions billions twice double triple"
)
MATHEMATICAL: Final = split(
    "doubled tripled halved quadrupled rem "
    "sin cos tan cot sec csc sine cosine tangent arcsin arccos arctan sinh cosh tanh log logs ln lg exp sqrt cbrt "
    "root mod modulo gcd lcm det lim limit sup inf sum prod floor ceil ceiling sgn sign abs max arg pi tau phi theta "
    "alpha beta gamma delta epsilon zeta eta lambda sigma omega rho mu nu xi psi chi kappa infinity infinite infty "
    "euler plus minus times over divided multiplied squared cubed power exponent choose choosing factorial permute "
    "binomial radical point negative positive reciprocal inverse conjugate imaginary "
    "remainder repeating recurring bar prime dot square cube cubic raised hoch mal quadrat durch moins "
    "fois racine carré elevado raíz equals integral derivative"
)
RETRACTING: Final = split(
    "no not wait hmm actually sorry oops correction incorrect incorrectly wrong false mistake mistaken instead rather "
    "redo recheck recompute almost nearly isn't wasn't cannot can't never unless except without nor neither either "
    "doesn't don't shouldn't error nope doubt unsure guess"
)
JOINING: Final = split(
    "and or to by than but if when where plus minus over modulo mod base between through until versus vs is was are "
    "equals equal above below then et ou y o и или"
)
LEADING: Final = split(
    "is are was were be been being has have had having equals gives give gave get gets got getting makes make made need needs "
    "needed pay pays paid cost costs earn earns earned spend spends spent save saves saved take takes took taken leave leaves "
    "left contain contains sell sells sold buy buys bought eat eats ate use uses used read reads want wants owe owes owed "
    "total totals answer result value number count amount sum difference product quotient age length width height area volume "
    "perimeter distance speed price profit weight therefore thus hence so exactly just only simply precisely approximately "
    "about around roughly the then finally option in at for of a an rs inr aud cad gbp eur usd es ist est son"
)
"""What may stand next to a number that it leads to."""
COMPARING: Final = split(
    "return print def lambda while import yield assert "
    "than least most over under between below above up or if unless versus vs before after except without modulo per "
    "greater less fewer percent"
)
SHORT_WORDS: Final = split(
    "pcs ppl rpm psi "
    "in of at on an as so he we it us my am pm he by up do go ft oz lb mi yd hr km cm mm kg mg ml pt qt wk yr mL sq cu"
)
_CONSECUTIVE: Final = "abcdefghijklmnopqrstuvwxyz"


def is_word(word: str) -> bool:
    """Return whether letters are a word of a language; `ab`, `xyz` and `abc` may be products of variables."""
    lowered = word.lower()
    if word in SHORT_WORDS or lowered in SHORT_WORDS:
        return True
    if len(word) <= 2:
        return False
    if len(word) == 3 and word.isascii() and word not in UNIT_OF:
        return bool(set(lowered) & set("aeiouy")) and lowered not in _CONSECUTIVE and set(lowered) - set("xyz") != set()
    return True


_MOST_WORDS: Final = 12
# Symbols that may touch the number. One letter that does is a variable: 5m may be five times m.
_TOUCHING: Final = re.compile(
    r"(?:cm|mm|km|kg|mg|ml|mL|lbs?|oz|ft|mph|hrs?|mins?|secs?|yds?|gal|kmh|kph|kW|kWh|MB|GB|Hz|mol|(?:k?m|mi|ft|cm)/(?:hr?|s|min))"
)
_LETTERS: Final = frozenset(["m", "g", "s", "h", "L", "N", "J", "W", "V", "K", "A"])
_POWER: Final = r"(?:\s?\^?\s?\{?[23]\}?)?"
_SYMBOL: Final = re.compile(rf"({_TOUCHING.pattern}|[A-Za-z]+(?:/[A-Za-z]+)?){_POWER}")
_WORD: Final = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SLASHED: Final = re.compile(r"/\s?[A-Za-z]{2,}")
_PERCENT: Final = re.compile(r"\s*(?:\\?%|percent|percentage|pct|per cent)(?P<rest>(?:\s.*)?)", re.IGNORECASE)
_DEGREES: Final = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*(?P<scale>[CF](?![A-Za-z]))?(?P<rest>.*)")
_MONEY: Final = re.compile(rf"\s*([${CURRENCIES}])(?P<rest>.*)", re.DOTALL)
_SCALES: Final = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
} | dict.fromkeys(("dozen", "dozens"), 12)
_COUNTED_MATHEMATICS: Final = frozenset(
    ["times", "squares", "cubes", "roots", "points", "primes", "remainder", "positive", "negative", "degree", "limit"]
)
_BEHIND_TIMES: Final = frozenset(["as", "per", "a", "each", "more", "every"])
_BEFORE_UNIT: Final = frozenset(["square", "cubic", "sq", "cu"])
_OTHER_SCRIPT: Final = re.compile(r"\s*[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,12}[.!]?")
_CHINESE_SCALES: Final = {"百万": 10**6, "千万": 10**7, "万亿": 10**12, "亿": 10**8, "万": 10**4, "百": 100, "千": 1000}
_NO_CHINESE_UNIT: Final = re.compile(
    r"平方(?![公千分厘毫英]?[米里寸尺码])|立方(?![公千分厘毫英]?[米里寸尺码])|次[方幂]|幂|阶乘|根|开方|加(?!仑)|[减乘除或和与至到且不错非负半又点派]"
    r"|以[上下内外]|多|余|折|成$|分之|模|对数|正[弦切]|余[弦切]|无穷|大于|小于|左右|[十百千万亿]|[零一二三四五六七八九两]"
)


@dataclass(frozen=True)
class Unit:
    """The text behind a number: the factor it multiplies by, its name where it is a known one, and whether it is `%`."""

    scale: int = 1
    name: str | None = None
    percent: bool = False


@functools.lru_cache(maxsize=2**12)
def read_unit(rest: str) -> Unit | None:
    """Return the unit that `rest`, the text behind a number, is; None where it is something else."""
    if not rest.strip():
        return Unit()
    if percent := _PERCENT.fullmatch(rest):
        return Unit(percent=True) if _is_prose(percent["rest"].split(), _PROSE_START) else None
    if degrees := _DEGREES.fullmatch(rest):
        return Unit() if _is_prose(degrees["rest"].split(), _PROSE_START) else None
    if money := _MONEY.fullmatch(rest):
        return Unit(name=UNIT_OF.get(money[1])) if _is_prose(money["rest"].split(), _PROSE_START) else None
    if _OTHER_SCRIPT.fullmatch(rest):
        return _chinese_unit(rest.strip().rstrip(".!"))
    words = rest.split()
    if words[0].lower() in _SCALES and rest[0].isspace():
        inner = read_unit(rest.split(words[0], 1)[1].removeprefix(" of"))
        return None if inner is None else Unit(inner.scale * _SCALES[words[0].lower()], inner.name)
    touching = not rest[0].isspace()
    first = _SYMBOL.fullmatch(words[0]) or re.match(rf"({_WORD.pattern})", words[0])
    if first is None or (
        touching and _TOUCHING.fullmatch(first[1]) is None and not (first[1] in UNIT_OF and len(first[1]) > 2)
    ):
        return None
    symbol = _SYMBOL.fullmatch(words[0])
    if symbol and (symbol[1] in _LETTERS or symbol[1] in UNIT_OF or "/" in symbol[1]):
        if "/" in symbol[1] and not _known_quotient(symbol[1]):
            return None
        if not _is_prose(words[1:], _PROSE_START):
            return None
        return Unit(name=_unit_name([symbol[1], *words[1:]]))
    return _counted(words)


def _known_quotient(symbol: str) -> bool:
    return all(part in UNIT_OF or part in _LETTERS or len(part) > 2 for part in symbol.split("/"))


def _counted(words: list[str]) -> Unit | None:
    """Read things that are counted: `blue marbles`, `square feet`, `times as many`, `days in total`."""
    lowered = [word.lower() for word in words]
    if lowered[0] in _BEFORE_UNIT and len(words) > 1:
        inner = read_unit(f" {' '.join(words[1:])}")
        return inner if inner is not None and inner.scale == 1 else None
    if lowered[0] == "times":
        behind = lowered[1] if len(words) > 1 else None
        return Unit() if (behind is None or behind in _BEHIND_TIMES) and _is_prose(words[1:], _PROSE_START) else None
    if lowered[0] in ("a", "an") and len(words) > 1 and is_word(words[1]):
        words = words[1:]
    elif len(words) > 1 and not is_word(lowered[0].strip(".,;'")):
        return None
    return Unit(name=_unit_name(words)) if _is_prose(words, frozenset()) else None


def _unit_name(words: list[str]) -> str | None:
    """Return the unit that is named first; a rate has none, as it has too many spellings."""
    if {"per", "a", "an", "each", "every"} & set(words):
        return None
    return next((unit for word in words[:2] if (unit := UNIT_OF.get(word) or UNIT_OF.get(word.lower()))), None)


_PROSE_START: Final = frozenset({"squared", "cubed", "a", "an", "per", "i", "I", "positive", "negative"})


def _is_prose(words: list[str], allowed: frozenset[str]) -> bool:
    """Return whether words say nothing that changes the number before them."""
    if len(words) > _MOST_WORDS:
        return False
    return all(_is_harmless(word.strip(".,;:!()\"'"), allowed, first=not place) for place, word in enumerate(words))


def _is_harmless(word: str, allowed: frozenset[str], *, first: bool) -> bool:
    lowered = word.lower()
    if not word or re.fullmatch(r"\^\{?[23]\}?", word):
        return True
    if lowered in ("a", "an", "i"):
        return not first or lowered in allowed
    if lowered in allowed or lowered in _COUNTED_MATHEMATICS:
        return True
    unpowered = re.sub(r"\^?\{?[23]\}?$", "", word)
    if not any(_WORD.fullmatch(each) for each in (unpowered, word.replace("/", ""))) and not _SLASHED.fullmatch(word):
        return False
    if any(part in NUMBER_WORDS or part in MATHEMATICAL or part in RETRACTING for part in re.split(r"[-/]", lowered)):
        return False
    return lowered not in JOINING and (is_word(word) or word in UNIT_OF)


def introduces(lead: str) -> bool:
    """Return whether words before a number only lead to it: `the largest n is`, `that she has`; not `more than`, `minus`.

    The word next to the number decides: one that is not known to lead to a number may change it (`thrice 8`), or be noise.
    """
    if _OTHER_SCRIPT_LEAD.fullmatch(lead):
        return True
    if lead[-1:].isalnum() or re.search(r"[A-Za-z]\($", lead):
        return False
    words = re.findall(r"[^\s,:()$*]+", lead)
    if len(words) > _MOST_WORDS:
        return False
    for word in words:
        lowered = word.lower()
        if _WORD.fullmatch(word) is None or lowered in MATHEMATICAL or lowered in NUMBER_WORDS:
            return False
        if lowered in RETRACTING or lowered in COMPARING or lowered == "but":
            return False
    return not words or words[-1].lower() in LEADING or words[-1] in UNIT_OF


_OTHER_SCRIPT_LEAD: Final = re.compile(
    r"\s*(?:(?![不非或除减加乘约多少超])[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]){0,16}(?:是|为|有|共|等于|一共|需要|得到|得)\s*[:：]?\s*"
)


def _chinese_unit(word: str) -> Unit | None:
    scale = 1
    for sign, value in _CHINESE_SCALES.items():
        if word.startswith(sign) and not re.match(r"千[克米瓦卡升帕]", word):
            scale, word = value, word.removeprefix(sign)
            break
    checked = re.sub(r"千(?=[克米瓦卡升帕])|^倍|百分点", "", word)
    return None if _NO_CHINESE_UNIT.search(checked) else Unit(scale)
