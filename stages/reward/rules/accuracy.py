"""Answer accuracy: extract, compare exactly, refuse what is too complex, and only then ask math-verify in a worker."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from pipeline.workers.pool import KillablePool, Outcome
from stages.reward.rules.exact import canonical, compare_exactly, read_number
from stages.reward.rules.extraction import Convention, Mark, find_answer
from stages.reward.rules.formula import as_formula
from stages.reward.rules.prose import choice_label, doubts, find_choice, last_lines, without_words, words_apart
from stages.reward.rules.verifier import compare_symbolically

Status = Literal["ok", "wrong", "unparseable", "timeout", "error"]
Verifier = Literal["exact", "math_verify", "math_verify_search"]

_GOLD_CONVENTIONS: Final[tuple[Convention, ...]] = ("boxed", "hashes")
_SENTENCE: Final = re.compile(r"(?:(?<![\\A-Za-z])[A-Za-z]{2,}\W+){3}|[\u4e00-\u9fff]{3}")
VERIFIER_MODULES: Final = ("stages.reward.rules.preload",)
"""What a pool for `grade_answers` preloads."""


class VerifierLostError(RuntimeError):
    """The processes that compare answers do not answer, whatever they are given."""


class GoldError(ValueError):
    """A gold answer that states nothing; the data are at fault, not the output."""


@dataclass(frozen=True)
class Grade:
    """The verdict on one output's answer: `ok` scores 1, `wrong` and `unparseable` 0, `timeout` and `error` nothing."""

    status: Status
    extracted: str | None
    """The answer found, in one spelling for equal numbers; None where the output states none."""
    screened: bool = False
    """Whether it was refused as too complex to compare (its status is then `unparseable`)."""

    @property
    def score(self) -> float | None:
        """Return 1.0, 0.0, or None where the verifier has no verdict."""
        return {"ok": 1.0, "wrong": 0.0, "unparseable": 0.0}.get(self.status)


def read_gold(answer: str) -> str:
    r"""Return the content of the gold's `\boxed{}`, what follows its `####` or its "final answer is", else all of it.

    Raises:
        GoldError: where nothing is left.
    """
    conventions = (*_GOLD_CONVENTIONS, "phrase") if "final answer is" in answer.lower() else _GOLD_CONVENTIONS
    gold = find_answer(answer, conventions) or answer.strip()
    if not gold:
        raise GoldError("the gold answer is empty")
    return gold


def grade_answers(
    pairs: Sequence[tuple[str, str]],
    *,
    conventions: Sequence[Convention],
    verifier: Verifier,
    pool: KillablePool,
    deadline_s: float,
    mark: Mark = "last",
) -> list[Grade]:
    """Return a grade for every (gold answer, output text), in order, always.

    Equal pairs of gold and extracted answer are compared once. The pool is used, and started, only for pairs that
    exact comparison leaves open.

    Raises:
        GoldError: a gold answer that is empty.
        VerifierLostError: the pool lost a comparison twice, whatever it was of.
    """
    golds = {answer: read_gold(answer) for answer in {gold for gold, _ in pairs}}
    cases = [_case(golds[gold], text, conventions, verifier, mark) for gold, text in pairs]
    grades = {case: _grade_without_process(case, verifier) for case in dict.fromkeys(cases)}
    undecided = [case for case, grade in grades.items() if grade is None]
    if undecided:
        outcomes = pool.run(compare_symbolically, [case.task() for case in undecided], deadline_s=deadline_s)
        if lost := next((outcome for outcome in outcomes if outcome.fault == "lost"), None):
            raise VerifierLostError(
                f"the verifier's worker processes were lost twice ({lost.detail}): that is no verdict, and none was "
                "written. Is the machine out of memory or processes? The same command compares again"
            )
        for case, outcome in zip(undecided, outcomes, strict=True):
            grades[case] = _grade_of(outcome, case)
    return [_given(grades[case]) for case in cases]


class _Case(NamedTuple):
    """Everything a grade depends on; equal cases are graded once."""

    gold: str
    answer: str | None
    searched: str | None
    """The end of the text, where math-verify is to search it."""

    def task(self) -> tuple[str, str | None, str | None]:
        """Return the arguments of `compare_symbolically`."""
        return self.gold, self.answer, self.searched


def _case(gold: str, text: str, conventions: Sequence[Convention], verifier: Verifier, mark: Mark) -> _Case:
    answer = find_answer(text, conventions, mark)
    search = verifier == "math_verify_search"
    option = choice_label(gold)
    if option is not None:
        label, marked = option
        chosen = find_choice(text, answer, marked=marked, search=search)
        if chosen is not None:
            return _Case(label, chosen, None)
    if answer is not None and compare_exactly(gold, answer) is None:
        answer = without_words(answer)
    return _Case(gold, answer, words_apart(last_lines(text)) if search and _leaves_open(answer) else None)


def _leaves_open(answer: str | None) -> bool:
    """Return whether there is something to search for: no answer was found, or a sentence that does not take it back."""
    if answer is None:
        return True
    return as_formula(answer) is None and _SENTENCE.search(answer) is not None and not doubts(answer)


@functools.lru_cache(maxsize=2**14)  # a question's outputs state few answers, from call to call
def _grade_without_process(case: _Case, verifier: Verifier) -> Grade | None:
    """Return the grade where exact comparison, or the rules of the verifier, settle it; None where math-verify is needed."""
    if case.answer is None:
        return None if case.searched else Grade("unparseable", None)
    spelling = canonical(case.answer)
    equal = compare_exactly(case.gold, case.answer)
    if equal is not None:
        return Grade("ok" if equal else "wrong", spelling)
    if verifier == "exact":
        return Grade("wrong" if read_number(case.answer) is not None else "unparseable", spelling)
    expected, stated = as_formula(case.gold), as_formula(case.answer)
    if any(complexity_objection(each, f"{case.gold} {expected}") for each in (case.answer, stated) if each is not None):
        return Grade("unparseable", spelling, screened=True)
    if case.searched is not None:
        return None
    if (
        expected is None
    ):  # words, or signs without a meaning for math-verify: equal spellings were the only way to be right
        return Grade("wrong", spelling)
    return Grade("unparseable", spelling) if stated is None else None


def _grade_of(outcome: Outcome, case: _Case) -> Grade:
    spelling = None if case.answer is None else canonical(case.answer)
    if outcome.fault is not None:
        return Grade("timeout" if outcome.fault == "timeout" else "error", spelling)
    match outcome.value:
        case "equal":
            return Grade("ok", spelling)
        case "different":
            return Grade("wrong", spelling)
        case "no_answer":
            return Grade("unparseable", spelling)
        case _:  # math-verify cannot read the gold answer: no verdict on the output
            return Grade("error", spelling)


def _given(grade: Grade | None) -> Grade:
    assert grade is not None, "every case was graded above"
    return grade


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


def complexity_objection(answer: str, gold: str) -> str | None:
    """Return why `answer` is too complex to be compared with `gold`, or None.

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
    """Return the exponent that begins at `start`: one operand, and with it whatever that is raised to (`9^9^9` is 9^(9^9))."""
    end = _operand_end(compact, start)
    operand = compact[start:end]
    return f"{operand}^{_exponent(compact, end + 1)}" if compact[end : end + 1] == "^" else operand


def _operand_end(compact: str, start: int) -> int:
    """Return the position behind a braced or parenthesised group, a number, or a single character."""
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
    """Return an upper bound of the size of a short expression: the product of its numbers, each raised to its exponent."""
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
    """Return the longest chain of powers of powers: 2 for `2^{3^4}`; a chain without braces (`9^9^9`) nests as well."""
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
