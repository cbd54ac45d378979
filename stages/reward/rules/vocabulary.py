"""Words that decide whether a text behind or before a number changes it: units, numbers, mathematics, doubt."""

from __future__ import annotations

from typing import Final

__all__ = [
    "COMPARING",
    "JOINING",
    "LEADING",
    "MATHEMATICAL",
    "NUMBER_WORDS",
    "RETRACTING",
    "SHORT_WORDS",
    "UNIT_OF",
    "is_word",
    "split",
]


def split(words: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(words.split())


_SAME: Final = {
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "inch": "inch inches",
    "ft": "ft foot feet",
    "yd": "yd yds yard yards",
    "mi": "mi mile miles",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilo kilos",
    "mg": "mg milligram milligrams",
    "oz": "oz ounce ounces",
    "ton": "ton tons tonne tonnes",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks wk wks",
    "month": "month months",
    "year": "year years yr yrs",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "L": "L liter liters litre litres",
    "gal": "gal gallon gallons",
    "quart": "quart quarts qt",
    "pint": "pint pints pt",
    "dollar": "dollar dollars usd USD $",
    "cent": "cent cents ¢",
    "euro": "euro euros EUR €",
    "mph": "mph",
    "km/h": "km/h kmh kph",
    "m/s": "m/s",
    "Hz": "Hz",
    "W": "W watt watts",
    "J": "J joule joules",
    "N": "N newton newtons",
}
UNIT_OF: Final = {word: unit for unit, words in _SAME.items() for word in words.split()}
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
    """Whether letters are a word of a language; `ab`, `xyz` and `abc` may be products of variables."""
    lowered = word.lower()
    if word in SHORT_WORDS or lowered in SHORT_WORDS:
        return True
    if len(word) <= 2:
        return False
    if len(word) == 3 and word.isascii() and word not in UNIT_OF:
        return bool(set(lowered) & set("aeiouy")) and lowered not in _CONSECUTIVE and set(lowered) - set("xyz") != set()
    return True
