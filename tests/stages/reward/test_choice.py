"""Multiple choice: labels in gold answers, and which one an output settles on."""

from __future__ import annotations

import time

import pytest

from stages.reward.pool import KillablePool
from stages.reward.rules.accuracy import Verifier, grade_answers
from stages.reward.rules.choice import choice_label
from stages.reward.rules.extraction import Convention

ALL: tuple[Convention, ...] = ("boxed", "tags", "hashes", "line", "phrase", "number")
NO_PROCESS = KillablePool(workers=1, memory_mb=64)


def status(gold: str, text: str, verifier: Verifier = "exact") -> str:
    (grade,) = grade_answers([(gold, text)], conventions=ALL, verifier=verifier, pool=NO_PROCESS, deadline_s=1.0)
    assert not NO_PROCESS.started
    return grade.status


@pytest.mark.parametrize(
    ("gold", "label"),
    [
        ("C", ("C", True)),
        ("(D)", ("D", True)),
        (r"\text{(B)}", ("B", True)),
        ("(D) Alina", ("D", True)),
        ("B. 12 cm", ("B", True)),
        ("Alina and the answer is\n(C) Cecile", ("C", True)),
        ("C Cecile", ("C", False)),
        ("I", ("I", True)),
    ],
)
def test_a_gold_answer_of_a_multiple_choice_question_has_its_label(gold: str, label: tuple[str, bool]) -> None:
    assert choice_label(gold) == label


@pytest.mark.parametrize("gold", ["17", "A circle", "AB", "x", "C + 1", "C=5", "I am", "Z", "", r"\frac{A}{B}", "C_1"])
def test_other_gold_answers_have_none(gold: str) -> None:
    assert choice_label(gold) is None


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("C", "The answer is (C)."),
        ("C", r"so \boxed{\text{(C)}}"),
        ("C", r"\boxed{C}"),
        ("D", "The answer is for sure D, it can't be A or B"),
        ("D", "The answer: D, it doesn't make sense for it to be A or B"),
        ("D", "D. it can't be A or B"),
        ("B", "B。不是 A"),
        ("B", "答案是B"),
        ("(D) Alina", "D"),
        ("(D) Alina", "The answer is (D) Alina"),
        ("C Cecile", "(C)"),
        ("B", "The answer is not A but B"),
        ("A", "A"),
    ],
)
def test_the_label_an_output_settles_on_is_right(gold: str, text: str) -> None:
    assert status(gold, text) == "ok"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("C", "The answer is (D)."),
        ("A", "The answer is not A but B"),
        ("B", "A. it can't be B"),
        ("(D) Alina", r"\boxed{C}"),
    ],
)
def test_another_label_is_wrong(gold: str, text: str) -> None:
    assert status(gold, text) == "wrong"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("A", "The answer is A or B"),
        ("B", r"\boxed{A, B}"),
        ("A", r"\boxed{A+1}"),
        ("A", "The answer is A circle"),
        ("I", "I think so"),
        ("A", "A circle has no corners"),
        ("A Christmas Carol", "The answer is A Tale of Two Cities"),
        ("C", "it is neither A nor B"),
        ("B", "I choose B in the end"),
    ],
)
def test_an_output_that_settles_on_no_label_is_not_right(gold: str, text: str) -> None:
    assert status(gold, text) != "ok"


def test_a_search_takes_the_only_label_that_is_not_denied() -> None:
    assert status("B", "It's not A because it makes no sense, therefore I think it's B", "math_verify_search") == "ok"
    assert status("C", "réponse est C non A", "math_verify_search") == "ok"
    assert status("B", "It's not B, therefore I think it's C", "math_verify_search") == "wrong"


def test_bait_costs_milliseconds() -> None:
    baits = ["not A or " * 600, "A," * 3000, "(" * 5000, "不是A" * 1500, "A " * 3000]
    started = time.perf_counter()
    for bait in baits:
        status("B", f"The answer is {bait}")
        choice_label(bait)
    assert time.perf_counter() - started < 0.5
