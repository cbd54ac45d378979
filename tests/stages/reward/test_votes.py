"""What samples vote for: spellings of one wrong answer are one vote, and what cannot be compared is not equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stages.reward import AccuracyConfig, FunctionConfig, RewardConfig, count_votes
from stages.reward.rules.exact import canonical
from stages.reward.votes import _merge
from stages.tables import Rewards
from tests.stages.rows import reward_row

pytestmark = pytest.mark.usefixtures("one_store")

PATIENT = RewardConfig(deadline_s=60)
"""No comparison here takes seconds, whatever else the machine does."""


def rewards(answers: Mapping[str, Sequence[tuple[str, str | None]]]) -> Rewards:
    """Question -> (status, extracted answer) of each sample."""
    return Rewards.write(
        [
            reward_row(question, sample, float(status == "ok"), status=status, extracted=extracted)
            for question, given in answers.items()
            for sample, (status, extracted) in enumerate(given)
        ]
    )


def wrong(*answers: str) -> list[tuple[str, str | None]]:
    return [("wrong", answer) for answer in answers]


def counted(answers: Sequence[tuple[str, str | None]], **settings: Any) -> list[int] | None:
    config = RewardConfig(components=(AccuracyConfig(**settings),), deadline_s=60)
    (row,) = count_votes(rewards({"q": answers}), config).rows()
    votes: list[int] | None = row["wrong"]
    return votes


@pytest.mark.claim("majorities over spellings", "5.2.2, Fig. 7")
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", r"\sqrt{2}/2"], [3]),
        (["x^2-1", "(x-1)(x+1)", "x^2+1"], [2, 1]),
        (["1/3", r"\frac{2}{6}", "0.3333333333"], [3]),
        ([r"2\sqrt{3}", r"\sqrt{12}", r"\sqrt{13}"], [2, 1]),
        (["3", "4", "3.0", "5"], [2, 1, 1]),
        (["\\{1,2\\}", "\\{2,1\\}"], [2]),
        (["(1,2)", "(2,1)"], [1, 1]),
        (["a b c", "odd"], [1, 1]),
        ([r"\sqrt{", r"\sqrt{"], [2]),  # equal spellings are one answer even where they cannot be read
        ([r"\sqrt{", r"}{"], [1, 1]),
    ],
)
def test_wrong_answers_are_counted_by_meaning(answers: list[str], expected: list[int]) -> None:
    assert counted(wrong(*answers)) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([r"2\pi r", r"2 r\pi", r"2\pi{}r", r"2 \pi\, r"], [4]),
        ([r"\pi r^2", r"r^2 \pi", r"\pi r"], [2, 1]),
        ([r"\sin x", r"\sin(x)", r"\sin y"], [2, 1]),
        ([r"a \cdot b", "ba", r"a \cdot c"], [2, 1]),
        ([r"\log x", r"\log  x", r"\log 2"], [2, 1]),
    ],
)
def test_the_spelling_that_is_kept_of_an_answer_can_still_be_read(answers: list[str], expected: list[int]) -> None:
    assert counted(wrong(*map(canonical, answers))) == expected


def test_answers_that_cannot_be_read_do_not_keep_others_from_being_compared() -> None:
    unreadable = [rf"\\sqrt{{{number}" for number in range(20)]
    votes = counted([*wrong(*unreadable, *unreadable), *wrong(r"\sqrt{8}", r"2\sqrt{2}")])
    assert votes == [2] * 21


def test_two_answers_are_one_only_where_each_is_right_with_the_other_as_gold() -> None:
    """A gold `x+y=2` takes the answer 2; a gold 2 does not take `x+y=2`."""
    assert counted(wrong("x+y=2", "x+y=2", "2")) == [2, 1]
    assert counted(wrong("x+y=2", "2", "2")) == [2, 1]


def test_exact_comparison_merges_what_it_calls_equal_and_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.pool.KillablePool._ready", lambda self: pytest.fail("a process was started"))
    answers = wrong("1.22", "1,22", "1.23", r"\sqrt{4}", r"\sqrt{4.0}")
    assert counted(answers, verifier="exact") == [2, 1, 1, 1]


def test_right_answers_and_those_without_a_verdict_do_not_vote_against() -> None:
    given = [("ok", "5"), ("ok", "5.0"), ("timeout", "7"), ("error", "7"), ("truncated", None), ("unparseable", "x=")]
    table = count_votes(rewards({"q": [*given, *wrong("7")]}), PATIENT)
    assert table.rows() == [{"question_id": "q", "samples": 7, "correct": 2, "wrong": [1]}]


@pytest.mark.parametrize(
    ("answers", "known"),
    [
        ({"a": [("wrong", None)], "b": wrong("1")}, {"a": False, "b": True}),
        ({"a": [("ok", None)], "b": wrong("1")}, {"a": True, "b": True}),  # right whatever it said
        ({"a": [("ok", None)], "b": [("wrong", None)]}, {"a": False, "b": False}),
        ({"a": [("unparseable", None)], "b": [("unparseable", None)]}, {"a": False, "b": False}),
        ({"a": [("unparseable", None)], "b": [("unparseable", "x=")]}, {"a": True, "b": True}),
    ],
)
def test_votes_are_null_where_what_was_answered_is_not_known(
    answers: dict[str, list[tuple[str, str | None]]], known: dict[str, bool]
) -> None:
    table = count_votes(rewards(answers), PATIENT)
    assert {row["question_id"]: row["wrong"] is not None for row in table.rows()} == known


def test_the_votes_of_a_reward_function_are_null() -> None:
    config = RewardConfig(components=(FunctionConfig(function="tests.stages.reward.reward_functions:by_text"),))
    (row,) = count_votes(rewards({"q": [("ok", None), ("wrong", None)]}), config).rows()
    assert row["wrong"] is None


def test_a_pair_is_compared_once_whatever_the_questions_that_have_it() -> None:
    pair = wrong(r"\sqrt{8}", r"2\sqrt{2}")
    made = count_votes(rewards({f"q{number}": pair for number in range(5)}), PATIENT)
    assert [row["wrong"] for row in made.rows()] == [[2]] * 5
    assert (made.metrics["votes/pairs"], made.metrics["votes/equal"]) == (2, 2)  # there and back


def test_a_comparison_that_misses_its_deadline_is_not_equal() -> None:
    hard = wrong(r"(x+1)^{40}(y+1)^{40}", r"(y+1)^{40}(x+1)^{40}+z-z")
    made = count_votes(rewards({"q": [*hard, *wrong("3", "3.0")]}), RewardConfig(deadline_s=0.001))
    assert made.rows()[0]["wrong"] == [2, 1, 1]
    assert made.metrics["votes/no_verdict"] > 0


def merged(
    counts: dict[str, int], equal: set[frozenset[str]], hanging: set[str] | None = None
) -> tuple[Any, list[Any]]:
    """The merged counts of one question under a made-up verifier, and the pairs it was asked."""
    asked: list[tuple[str, str]] = []

    def compare(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        asked.extend(pairs)
        return [None if set(pair) & (hanging or set()) else frozenset(pair) in equal for pair in pairs]

    (found,) = _merge([Counter(counts)], compare)
    return dict(found), asked


def test_the_most_frequent_spelling_is_compared_first_and_names_the_answer() -> None:
    found, asked = merged({"a": 1, "b": 3, "c": 2}, {frozenset("ab")})
    assert found == {"b": 4, "c": 2}
    assert asked == [("b", "c"), ("b", "a")]


def test_a_spelling_that_was_merged_is_not_compared_again() -> None:
    _, asked = merged(dict.fromkeys("abcd", 1), {frozenset("ab"), frozenset("ac"), frozenset("ad")})
    assert asked == [("a", "b"), ("a", "c"), ("a", "d")]


def test_an_answer_that_hangs_does_not_keep_others_apart() -> None:
    found, asked = merged({"x": 9, "a": 2, "b": 1, "c": 1}, {frozenset("ab")}, hanging={"x"})
    assert found == {"x": 9, "a": 3, "c": 1}
    assert len(asked) == 5


def test_an_answer_without_two_verdicts_is_not_asked_about_again() -> None:
    counts = {"a": 9, "b": 8, "c": 7, "d": 6, "x": 1}
    found, asked = merged(counts, set(), hanging={"x"})
    assert found == counts
    assert [pair for pair in asked if "x" in pair] == [("a", "x"), ("b", "x")]


def test_a_question_full_of_answers_that_hang_costs_few_deadlines() -> None:
    counts = {f"x{number:02}": 1 for number in range(60)}
    found, asked = merged(counts, set(), hanging=set(counts))
    assert found == counts
    assert len(asked) == 59
    assert merged({"a": 3, "b": 2, "c": 1}, {frozenset("bc")}, hanging={"a"})[0] == {"a": 3, "b": 3}


def test_blank_answers_are_compared_with_nothing() -> None:
    found, asked = merged({"": 2, " ": 1, "a": 1}, set())
    assert (found, asked) == ({"": 2, " ": 1, "a": 1}, [])
