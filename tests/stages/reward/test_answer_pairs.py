"""Pairs of gold answer and output that graders get wrong: no reward for a wrong one, none withheld from a right one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.workers.pool import KillablePool
from stages.reward import AccuracyConfig
from stages.reward.rules.accuracy import Verifier, grade_answers
from stages.reward.rules.extraction import find_answer

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]


def statuses(pairs: list[dict[str, Any]], verifier: Verifier, verifiers: KillablePool) -> list[str]:
    conventions = AccuracyConfig().conventions
    asked = [(pair["gold"], pair["output"]) for pair in pairs]
    return [
        grade.status
        for grade in grade_answers(asked, conventions=conventions, verifier=verifier, pool=verifiers, deadline_s=20.0)
    ]


def test_there_are_300_pairs_half_of_them_right_and_none_twice() -> None:
    counts = Counter(pair["expected"] for pair in PAIRS)
    assert counts[True] == counts[False] >= 150
    assert len({(pair["gold"], pair["output"]) for pair in PAIRS}) == len(PAIRS)


@pytest.mark.claim("a number taken out of an unread formula")
@pytest.mark.parametrize("verifier", ["math_verify", pytest.param("math_verify_search", marks=pytest.mark.slow)])
def test_every_pair_is_graded_as_it_should_be(verifier: Verifier, verifiers: KillablePool) -> None:
    found = statuses(PAIRS, verifier, verifiers)
    assert [
        (p["gold"], p["output"], s) for p, s in zip(PAIRS, found, strict=True) if (s == "ok") != p["expected"]
    ] == []
    assert set(found) == {"ok", "wrong", "unparseable"}


def test_the_exact_verifier_rewards_no_wrong_answer(verifiers: KillablePool) -> None:
    found = statuses(PAIRS, "exact", verifiers)
    assert [p for p, s in zip(PAIRS, found, strict=True) if s == "ok" and not p["expected"]] == []


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("the set of all primes", r"\boxed{7}"),
        (r"1, 2, \ldots, n", r"\boxed{1, 2}"),
        ("Tuesday and Friday", r"\boxed{\text{Monday}}"),
    ],
)
def test_a_gold_of_words_or_signs_without_meaning_is_compared_as_text(
    gold: str, output: str, verifiers: KillablePool
) -> None:
    pairs = [{"gold": gold, "output": output}, {"gold": gold, "output": rf"\boxed{{{gold}}}"}]
    assert statuses(pairs, "math_verify", verifiers) == ["wrong", "ok"]


@pytest.mark.parametrize(
    ("gold", "output", "verifier", "status"),
    [
        *((gold, r"\boxed{x+1}", "math_verify", "error") for gold in (r"\frac{1}{2}{", "((2", "2 +* 3", r"\sqrt")),
        *(("17", output, "exact", "unparseable") for output in ("#### x+1", "#### 17 + 1", "no idea")),
        ("17", "#### 18", "exact", "wrong"),
    ],
)
def test_what_a_verifier_cannot_read_has_no_verdict_of_right_or_wrong(
    gold: str, output: str, verifier: Verifier, status: str, verifiers: KillablePool
) -> None:
    assert statuses([{"gold": gold, "output": output}], verifier, verifiers) == [status]


def test_of_several_marks_the_first_or_the_last_counts() -> None:
    for one, other in (
        (r"\boxed{%s}", "\n"),
        ("#### %s", "\n"),
        ("The answer is %s.", " "),
        ("A: %s", "\n"),
        ("<answer>%s</answer>", ""),
    ):
        text = other.join([one % 42, "Question: what next?", one % 7])
        conventions = AccuracyConfig().conventions
        assert (find_answer(text, conventions, "first"), find_answer(text, conventions, "last")) == ("42", "7")
