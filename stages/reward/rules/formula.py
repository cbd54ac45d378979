r"""An answer as one LaTeX formula, or not at all: what the parser behind it would drop or guess is refused here.

math-verify takes a number out of a formula that it cannot read, and its LaTeX parser skips what it has no meaning for: `3_2`,
`3'` and `3\ldots` are 3 for it, `3 4` is 7. Here every sign must have a meaning; a unit goes only by the rules of `units`.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from stages.reward.rules.exact import undressed
from stages.reward.rules.numerals import split
from stages.reward.rules.units import MATHEMATICAL, is_word, read_unit

_LONGEST: Final = 512
_FUNCTIONS: Final = split(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log lg exp sqrt cbrt min max gcd lcm det lim pi "
    "infty infinity theta alpha beta gamma delta epsilon lambda mu sigma omega phi psi rho tau"
)
_READ: Final = split(
    "frac sqrt cdot times div pm mp pi e i infty left right cup cap setminus in le leq leqslant ge geq geqslant lt gt "
    "ne neq approx emptyset varnothing begin end lfloor rfloor lceil rceil max min gcd lcm det sum prod int lim ln "
    "log lg exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth binom mathbb circ degree alpha beta "
    "gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega lbrace rbrace langle rangle lvert rvert "
    "vert mid to text operatorname"
)
"""Commands that the parser behind gives their meaning."""
_RENAMED: Final = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("ast", "centerdot"), "cdot"),
    **{"leqslant": "le", "geqslant": "ge", "lbrack": "[", "rbrack": "]", "imath": "i", "infinity": "infty"},
}
_COMMAND: Final = re.compile(r"\\([A-Za-z]+)")
_ENVIRONMENT: Final = re.compile(
    r"\\begin\s?\{(?:[pbvBV]?matrix|array|smallmatrix|cases|aligned)\}.*?\\end\s?\{\w+\}", re.DOTALL
)
_MATRIX: Final = re.compile(r"\\begin\s?\{[pbvBV]?matrix\}")
_ELLIPSIS: Final = re.compile(r"\.\.|\\[lcdv]?dots")
_RUN: Final = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_CONNECTION: Final = re.compile(r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])")
_NAMED_SIDE: Final = re.compile(
    r"^\s*(?:(?:m\s*)?\\(?:measured)?angle\s*\{?\s*([A-Z]{1,3})\s*\}?|\\(?:overline|bar|hat|vec)\s*\{([A-Za-z]{1,2})\})\s*="
)
_DANGLING: Final = re.compile(r"^\W*(?:and|or)(?![A-Za-z])|(?<![A-Za-z\\])(?:and|or)\W*$")
_NAMED_TEXT: Final = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|textnormal|textit|textrm|operatorname|hbox)\s?\{([^{}]*)\}"
)
_UNIT_LETTER: Final = re.compile(
    r"(?:\\[,; ]|~|\s)*\\(?:text|mbox|mathrm|textrm)\s?\{\s*[mgshLNJWVK]\s*\}(?:\^\{?[23]\}?)?\s*\$?$"
)
_TRIGONOMETRIC: Final = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES: Final = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_PLAIN_ROOT: Final = re.compile(r"(\\?)(sqrt|cbrt)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_PLAIN_FRACTION: Final = re.compile(r"\\frac\s*\(([^()]*)\)\s*\(([^()]*)\)")
_LABEL_ONLY_FRACTION: Final = re.compile(r"\\(frac|binom)\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)(?!\d)|\{([^{}]*)\})")
_ALLOWED: Final = re.compile(r"[0-9A-Za-z+\-*/^_=<>()\[\]{}|!,.:&\\% ]*")
_BASE: Final = re.compile(r"\d\s*_")
_MANY_POINTS: Final = re.compile(r"\d*\.\d+\.\d|\.\s*\.")
_NAME: Final = re.compile(
    r"\s*(?:[A-Za-z]|\\[A-Za-z]+)(?:\s*_\s*(?:\{[^{}]*\}|\w))?\s*(?:\(\s*[A-Za-z0-9](?:\s*,\s*[A-Za-z0-9])*\s*\))?\s*"
    r"|\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)\s*|\s*\|?[A-Z]{1,3}\|?\s*"
    r"|\s*\\frac\s*\{[A-Z]{1,3}\}\s*\{[A-Z]{1,3}\}\s*|\s*[A-Z]+(?:_\{[A-Z]+\})?\s*[:/]\s*[A-Z]+(?:_\{[A-Z]+\})?\s*"
)


@functools.lru_cache(maxsize=2**12)
def as_formula(answer: str) -> str | None:
    """Return the answer in LaTeX that the parser reads whole, without its unit; None where it is no formula."""
    if len(answer) > _LONGEST:
        return None
    answer = _UNIT_LETTER.sub("", answer)
    text = undressed(answer.replace("\n", " \\\\ ") if "\\begin" not in answer else answer.replace("\n", " "))
    if _DANGLING.search(text):
        return None
    text = _worded(_operators(_NAMED_SIDE.sub(r"\1\2=", text)))
    text = _separated(text).strip().strip(",").strip()
    return text if text and _is_read(text) else None


def sides(formula: str) -> list[str]:
    """Return the parts of a chain of equations, split where nothing is open; relations other than `=` stay within a part."""
    return _split(formula, "=")


def parts(formula: str) -> list[str]:
    """Return the members of a list that no bracket holds."""
    return _split(formula, ",")


def is_name(side: str) -> bool:
    """Return whether one side of an equation only names what the other one is: `x`, `f(x)`, `(x, y)`."""
    return _NAME.fullmatch(side) is not None and side.strip() not in (r"\pi", "e", "i", r"\infty", r"\emptyset")


def _operators(text: str) -> str:
    """Return the signs of plain text and of programs in LaTeX."""
    text = text.replace(r"\$", "").replace("$", " ").replace("`", "").replace("**", "^")
    for sign, command in (("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("==", "="), ("≈", r"\approx ")):
        text = text.replace(sign, command)
    text = _COMMAND.sub(lambda command: _renamed(command[1]), text)
    for _ in range(3):
        text = _PLAIN_ROOT.sub(lambda root: (r"\sqrt" if root[2] == "sqrt" else r"\sqrt[3]") + f"{{{root[3]}}}", text)
        text = _PLAIN_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _LABEL_ONLY_FRACTION.sub(lambda f: rf"\{f[1]}{{{f[2] or f[3]}}}{{{f[4] or f[5]}}}", text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = re.sub(r"\^\s*([-+]?\d+)", r"^{\1}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\\log\s*_\s*(\d)(?=\s)", r"\\log_{\1}", text)
    return re.sub(r"\\sqrt\s+(?=[\d{])", r"\\sqrt", text)


def _renamed(command: str) -> str:
    name = _RENAMED.get(command, command)
    return name if not name[0].isalpha() else rf"\{name}"


def _worded(text: str) -> str:
    """Read the words: `and`, `or`, names of functions; a unit at the end goes, and letters left over are variables."""
    text = _NAMED_TEXT.sub(lambda named: _text(named[1]), text)
    text = _CONNECTION.sub(",", text)
    place = _unit_place(text)
    text = text[:place].rstrip() if place is not None else text
    return _RUN.sub(lambda run: _letters_of(run[0]), text)


def _text(content: str) -> str:
    r"""Return what `\text{}` holds: its words stand apart, a single letter or a number is what it is."""
    core = content.strip()
    return f" {core} " if (len(core) > 1 and core.isalpha()) or " " in core else f"{{{core}}}" if core else " "


def _unit_place(text: str) -> int | None:
    """Return where a unit begins that ends the formula: `4\\sqrt{2} cm`, `36\\pi square inches`."""
    for run in re.finditer(
        r"(?<=[\d})\]a-zA-Z])\s+(?=[A-Za-z]{2})|(?<=[}\d)])\s*(?=\^\{?\\circ)|(?<=[\d})])\s*(?=[\u3040-\ud7af])", text
    ):
        head, rest = text[: run.start()], text[run.start() :]
        if head.count("{") > head.count("}") or head.count("(") > head.count(")"):
            continue
        first = re.match(r"\s*([A-Za-z]+)", rest)
        if (
            first
            and first[1].lower() not in ("square", "cubic")
            and (first[1].lower() in MATHEMATICAL or first[1] in _FUNCTIONS)
        ):
            continue
        unit = read_unit(rest if rest[:1].isspace() else f" {rest}" if first else rest)
        if unit is not None and unit.scale == 1 and not unit.percent:
            return run.start()
    return None


def _letters_of(run: str) -> str:
    r"""Return a run of letters in a formula: names of functions and constants get their backslash (`2pi`, `sinx`)."""
    name, argument = (run, "") if run in _FUNCTIONS else (run[:-1], run[-1])
    if name in _FUNCTIONS and (not argument or len(name) > 2):
        return rf"\{'infty' if name == 'infinity' else name} {argument}"
    return run


def _separated(text: str) -> str:
    """Return rows and columns outside of an environment as members of a list, and what `;` separates too."""
    kept: list[str] = []
    place = 0
    for environment in _ENVIRONMENT.finditer(text):
        kept += [_listed(text[place : environment.start()]), environment[0]]
        place = environment.end()
    return "".join([*kept, _listed(text[place:])])


def _listed(text: str) -> str:
    """Return the members separated by commas; `p=5,q=2;p=7,q=2` are two tuples."""
    groups = text.split(";")
    if len(groups) > 1 and all("," in group and not _open(group) for group in groups):
        text = ",".join(f"({group.strip()})" for group in groups)
    return re.sub(r"\s*,(?:\s*,)+\s*", ", ", re.sub(r"\\\\|&|;", ",", text))


def _open(text: str) -> bool:
    return any(sign in text for sign in "()[]{}")


def _is_read(text: str) -> bool:
    """Return whether every sign of the formula has a meaning for the parser."""
    inside = text.replace(r"\{", "(").replace(r"\}", ")").replace(r"\%", "%").replace(r"\|", "|")
    if _ALLOWED.fullmatch(inside) is None or _ELLIPSIS.search(text) or _BASE.search(text) or _MANY_POINTS.search(text):
        return False
    if any(command not in _READ for command in _COMMAND.findall(inside)):
        return False
    if any("\\in" in _COMMAND.sub(lambda c: f" {c[0]} ", part).split() for part in parts(text)[1:]):
        return False  # `2k, k \in \mathbb{Z}`: the parser reads no condition
    inside = re.sub(r"_\{[A-Z]+\}", "_{X}", inside)  # points of a figure
    core = _COMMAND.sub("@", re.sub(r"\\(?:begin|end)\s?\{\w+\}", " ", inside))
    if re.search(r"\d\s+\d", re.sub(r"\\\\", ",", re.sub(r"(?<=\d)\s+(?=\d{3}(?:\D|$))", "", core))):
        return False
    if any(
        len(run) > 3 or run.lower() in MATHEMATICAL or (len(run) > 2 and is_word(run)) or run in _STOP
        for run in _RUN.findall(core)
    ):
        return False
    return not _ENVIRONMENT.sub("", text).count("\\begin")


_STOP: Final = split(
    "if is in of to not for all any the are was has but yes no so as at by be do it we he an on up us my"
)


def _split(formula: str, separator: str) -> list[str]:
    found, depth, start = [], 0, 0
    text = formula.replace(r"\left", "     ").replace(r"\right", "      ")
    for place, sign in enumerate(text):
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == separator and depth <= 0 and text[place - 1 : place] not in ("<", ">", "!"):
            found.append(formula[start:place])
            start = place + 1
    return [*found, formula[start:]]
