"""Answer accuracy: extract, compare exactly, screen, and only then ask math-verify in a killable process."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from stages.reward.pool import KillablePool, Outcome
from stages.reward.rules.choice import choice_label, find_choice
from stages.reward.rules.exact import canonical, compare_exactly, read_number
from stages.reward.rules.extraction import Convention, Mark, find_answer, last_lines, words_apart
from stages.reward.rules.formula import as_formula
from stages.reward.rules.screen import objection
from stages.reward.rules.statement import doubts, without_words
from stages.reward.rules.verifier import compare_symbolically

__all__ = ["VERIFIER_MODULES", "GoldError", "Grade", "Status", "Verifier", "grade_answers", "read_gold"]

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
        """1.0, 0.0, or None where the verifier has no verdict."""
        match self.status:
            case "ok":
                return 1.0
            case "wrong" | "unparseable":
                return 0.0
            case "timeout" | "error":
                return None


def read_gold(answer: str) -> str:
    r"""The gold answer proper: the content of its `\boxed{}`, what follows its `####` or its "final answer is", else all of it.

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
    """A grade for every (gold answer, output text), in order, always.

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
        """Arguments of `compare_symbolically`."""
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
    """Whether there is something to search for: no answer was found, or a sentence that does not take it back."""
    if answer is None:
        return True
    return as_formula(answer) is None and _SENTENCE.search(answer) is not None and not doubts(answer)


@functools.lru_cache(maxsize=2**14)  # a question's outputs state few answers, from call to call
def _grade_without_process(case: _Case, verifier: Verifier) -> Grade | None:
    """The grade where exact comparison, or the rules of the verifier, settle it; None where math-verify is needed."""
    if case.answer is None:
        return None if case.searched else Grade("unparseable", None)
    spelling = canonical(case.answer)
    equal = compare_exactly(case.gold, case.answer)
    if equal is not None:
        return Grade("ok" if equal else "wrong", spelling)
    if verifier == "exact":
        return Grade("wrong" if read_number(case.answer) is not None else "unparseable", spelling)
    expected, stated = as_formula(case.gold), as_formula(case.answer)
    if any(objection(each, f"{case.gold} {expected}") for each in (case.answer, stated) if each is not None):
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
