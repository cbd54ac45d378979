"""Words around an answer, and the option that an output settles on."""

from __future__ import annotations

import time

import pytest

from pipeline.workers.pool import KillablePool
from stages.reward.rules.accuracy import Verifier, grade_answers
from stages.reward.rules.extraction import Convention
from stages.reward.rules.numerals import chinese_number, english_number
from stages.reward.rules.prose import choice_label, without_words
from stages.reward.rules.units import read_unit


@pytest.mark.parametrize(
    ("stated", "answer"),
    [
        ("72, in total, so he has enough", "72"),
        ("72; that is six dozen", "72"),
        ("72 (six dozen).", "72"),
        ("72 dollars, as he sold 6 boxes.", "72 dollars"),
        ("72 — six dozen", "72"),
        ("72: all of them", "72"),
        ("72 because 6*12=72", "72"),
        ("72，所以答案正确", "72"),
        ("1,072, in all", "1,072"),
        ("(1, 2), in that order", "(1, 2)"),
        ("1, 2, 3, in that order", "1, 2, 3"),
        ("x+1, as required", "x+1"),
        ("the largest $n$ is 34", "34"),
        ("that she has 42 eggs", "42 eggs"),
        ("每份应该是12吨", "12吨"),
        (r"3, \text{ as shown}", "3"),
        ("3 dollars, i.e. the change", "3 dollars"),
        ("Area = 3", "3"),
        (r"\text{Total: }3", "3"),
    ],
)
def test_words_that_explain_an_answer_are_cut_off(stated: str, answer: str) -> None:
    assert without_words(stated) == answer


@pytest.mark.claim("a number taken out of an unread formula")
@pytest.mark.parametrize(
    "stated",
    ["72, 73", "72, or 73", "72, no, 73", "72, I mean 73", "72, which is wrong", "72, then 73", "72, so 73",
     "72, seventy-three", "72 — seventy-three", "72, squared", "72, minus two", "72 (mod 5)", "72 - pi", "72, x = 3",
     "72，不是73", "72，或73", "72、73", "x = 1, y = 2", "f (ab)", "2 (x+1)", "more than 72", "at least 72", "minus 72",
     "f(2)=3", "12 or so", "apples, pears", "return 1", "sin = 3", "3 if x > 0"],
)  # fmt: skip
def test_words_that_join_deny_or_compute_stay(stated: str) -> None:
    assert without_words(stated) == stated


@pytest.mark.parametrize(
    "rest",
    ["", " cm", "cm", " cm^2", " m", " km/h", " miles per hour", " blue marbles", " a day", "^\\circ", "€", " times", " weeks",
     "weeks", " square feet", " feet squared", " dollars in total", "元", "个苹果", "千克", "平方米", "円", "개",
     " Äpfel", " pcs"],
)  # fmt: skip
def test_units_currencies_and_counted_things_leave_the_number(rest: str) -> None:
    unit = read_unit(rest)
    assert unit is not None
    assert (unit.scale, unit.percent) == (1, False)


@pytest.mark.parametrize(
    "rest",
    [" squared", " cubed", " pi", " sin x", " log y", " theta", " mod 5", " choose two", " factorial", " over y", " times x",
     " less than x", " more than x", " or more", " to one", " halves", " tenths", " point five", " xy", " ab", " abc", " k",
     " t", "m", "s", "x", "g", " no wait six", " is wrong", "°2", " doubled", "平方", "次方", "以上", "或", "半", "多", "成",
     "的平方"],
)  # fmt: skip
def test_mathematics_variables_and_doubts_do_not(rest: str) -> None:
    assert read_unit(rest) is None


@pytest.mark.parametrize(
    ("rest", "scale", "name"),
    [
        (" dozen", 12, None),
        (" dozen eggs", 12, None),
        (" thousand dollars", 1000, "dollar"),
        ("万", 10**4, None),
        ("亿元", 10**8, None),
        (" kilometers", 1, "km"),
        (" hrs", 1, "h"),
        (" miles per hour", 1, None),
    ],
)
def test_units_have_their_scale_and_known_ones_their_name(rest: str, scale: int, name: str | None) -> None:
    unit = read_unit(rest)
    assert unit is not None
    assert (unit.scale, unit.name) == (scale, name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seventy-two", 72),
        ("two hundred and five", 205),
        ("five hundred thousand", 500_000),
        ("one million two hundred thousand and one", 1_200_001),
        ("six dozen", 72),
        ("a dozen", 12),
        ("zero", 0),
        ("one two", None),
        ("one half", None),
        ("two and", None),
        ("ten pi", None),
        ("twenty thirty", None),
        ("", None),
    ],
)
def test_integers_in_english_words_are_read_or_refused(text: str, value: int | None) -> None:
    assert english_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("十二", 12),
        ("三百二十一", 321),
        ("两万", 20_000),
        ("一亿二千万", 120_000_000),
        ("一千零五", 1005),
        ("二〇二四", 2024),
        ("零", 0),
        ("万", None),
        ("十十", None),
        ("3", None),
        ("", None),
    ],
)
def test_integers_in_chinese_numerals_are_read_or_refused(text: str, value: int | None) -> None:
    assert chinese_number(text) == value


def test_a_long_statement_costs_milliseconds() -> None:
    started = time.process_time()
    for bait in ("72, ", "72 (", "a, ", "(" * 50, "is 7 ", "- ", "not ", "，"):
        without_words(bait * 50_000)
    assert time.process_time() - started < 1.0


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
        *(
            (gold, None)
            for gold in ("17", "A circle", "AB", "x", "C + 1", "C=5", "I am", "Z", "", r"\frac{A}{B}", "C_1")
        ),
    ],
)
def test_a_gold_answer_of_a_multiple_choice_question_alone_has_a_label(
    gold: str, label: tuple[str, bool] | None
) -> None:
    assert choice_label(gold) == label


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("C", "The answer is (C).", "ok"),
        ("C", r"so \boxed{\text{(C)}}", "ok"),
        ("C", r"\boxed{C}", "ok"),
        ("D", "The answer is for sure D, it can't be A or B", "ok"),
        ("D", "The answer: D, it doesn't make sense for it to be A or B", "ok"),
        ("D", "D. it can't be A or B", "ok"),
        ("B", "B。不是 A", "ok"),
        ("B", "答案是B", "ok"),
        ("(D) Alina", "D", "ok"),
        ("(D) Alina", "The answer is (D) Alina", "ok"),
        ("C Cecile", "(C)", "ok"),
        ("B", "The answer is not A but B", "ok"),
        ("A", "A", "ok"),
        ("C", "The answer is (D).", "wrong"),
        ("A", "The answer is not A but B", "wrong"),
        ("B", "A. it can't be B", "wrong"),
        ("(D) Alina", r"\boxed{C}", "wrong"),
        ("A", "The answer is A or B", "wrong"),
        ("B", r"\boxed{A, B}", "unparseable"),
        ("A", r"\boxed{A+1}", "unparseable"),
        ("A", "The answer is A circle", "wrong"),
        ("I", "I think so", "unparseable"),
        ("A", "A circle has no corners", "unparseable"),
        ("A Christmas Carol", "The answer is A Tale of Two Cities", "wrong"),
        ("C", "it is neither A nor B", "unparseable"),
        ("B", "I choose B in the end", "unparseable"),
    ],
)
def test_an_output_is_graded_by_the_label_it_settles_on(gold: str, text: str, expected: str) -> None:
    assert status(gold, text) == expected


def test_a_search_takes_the_only_label_that_is_not_denied() -> None:
    assert status("B", "It's not A because it makes no sense, therefore I think it's B", "math_verify_search") == "ok"
    assert status("C", "réponse est C non A", "math_verify_search") == "ok"
    assert status("B", "It's not B, therefore I think it's C", "math_verify_search") == "wrong"


def test_bait_costs_milliseconds() -> None:
    baits = ["not A or " * 600, "A," * 3000, "(" * 5000, "不是A" * 1500, "A " * 3000]
    started = time.process_time()
    for bait in baits:
        status("B", f"The answer is {bait}")
        choice_label(bait)
    assert time.process_time() - started < 0.5
