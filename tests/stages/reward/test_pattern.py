"""A user's regular expression as the asked form: it may backtrack for ever, and then costs its own outputs their score only."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipeline.residency import resident
from stages.reward import AccuracyConfig, FormatConfig, RewardConfig, score
from stages.reward.pool import KillablePool
from stages.reward.rules.format import is_quick, match_pattern
from stages.tables import Questions, Rewards, Rollouts

pytestmark = [pytest.mark.usefixtures("store"), pytest.mark.filterwarnings("ignore:component 'format'")]

BOMB, NESTED = "a" * 60 + "b", r"(a+)+$"
"""2^60 ways to cut the letters, none of which ends at the end."""


def scored(config: RewardConfig, *texts: str) -> Rewards:
    fixed = {"prompt_ids": [1], "output_ids": [2], "logprobs": [0.0], "finish_reason": "stop", "temperature": 1.0}
    rows = [
        {"question_id": "q", "sample": sample, "text": text, "text_ends": [len(text)], "seed": 0} | fixed
        for sample, text in enumerate(texts)
    ]
    asked = [{"question_id": "q", "question": "?", "answer": "1", "solution": None}]
    return score(Rollouts.write(rows), Questions.write(asked), config)


def pattern(expression: str, *others: Any, **settings: Any) -> RewardConfig:
    form = FormatConfig(form="pattern", pattern=expression)
    return RewardConfig(components=(form, *others), workers=2, deadline_s=0.5, **settings)


def column(rewards: Rewards, name: str) -> list[Any]:
    return [row[name] for row in rewards.rows()]


def test_a_pattern_that_hangs_on_an_output_costs_that_one_its_score() -> None:
    scored(pattern("(a)"), "a")  # the workers have started
    texts = ["aaa", "b", BOMB, *("a" * count for count in range(4, 24))]
    started = time.perf_counter()
    with pytest.warns(
        UserWarning, match=r"no score from the pattern \(a\+\)\+\$ for 1 of 23 outputs, such as \('q', 2\)"
    ):
        made = scored(pattern(NESTED), *texts)
    # Its call of 16 outputs, then halves down to the one; each may have to wait for a new worker.
    assert time.perf_counter() - started < 5 * (0.5 + 2.0)
    assert column(made, "status") == ["ok", "wrong", "timeout", *["ok"] * 20]
    assert column(made, "reward") == pytest.approx([0.1, 0.0, None, *[0.1] * 20])
    assert made.metrics["reward/faults"] == pytest.approx(1 / 23)


def test_outputs_that_end_alike_are_waited_for_once() -> None:
    scored(pattern("(a)"), "a")
    started = time.perf_counter()
    made = scored(pattern(NESTED), *[BOMB] * 30)
    assert time.perf_counter() - started < 0.5 + 2.5
    assert column(made, "status") == ["timeout"] * 30


def test_an_output_without_verdict_on_its_form_is_treated_as_declared() -> None:
    exact = AccuracyConfig(verifier="exact")
    assert column(scored(pattern(NESTED, exact), BOMB, "1"), "reward") == [None, 1.0]
    form = FormatConfig(form="pattern", pattern=NESTED, missing="zero")
    made = scored(RewardConfig(components=(exact, form), deadline_s=0.5), BOMB, "1", "aa")
    assert column(made, "reward") == pytest.approx([0.0, 1.0, 0.1])
    assert column(made, "status") == ["unparseable", "ok", "unparseable"]


SLOW = ["(a+)+$", "(a|aa)+$", r"(a)\1*", "a?a?aa", "a*a*b", "a*a+b", "a{1,9}a{1,9}b", r"(?=a*)b"]
QUICK = [r"\d\s*$", "a*b", ".*b", "a+$", "^<think>", "[a-z]{3,}b", "ab|ac*"]


def test_a_pattern_runs_in_this_process_only_where_no_text_can_keep_it_busy() -> None:
    assert [expression for expression in SLOW if is_quick(expression)] == []
    assert [expression for expression in QUICK if not is_quick(expression)] == []
    started = time.perf_counter()
    for expression in QUICK:
        match_pattern(expression, {"texts": ["a" * 4096, "1" + " " * 4094 + "x"]})
    assert time.perf_counter() - started < 0.2 * 2 * len(QUICK)
    scored(pattern(r"\d\s*$"), "7")
    assert not resident("pattern", (2, 1024), lambda: KillablePool(workers=1, memory_mb=64)).started


@pytest.mark.parametrize(
    ("expression", "text", "expected"),
    [
        (r"\d\s*$", "so 7\n", 1.0),
        (r"\d\s*$", "7 apples", 0.0),
        (r"^<think>", "<think> well", 1.0),
        (r"^<think>", "well <think>", 0.0),
        (r"first", "first" + " " * 4096, 0.0),  # beyond the last 4 KiB
        (r"first", "first" + " " * 4091, 1.0),
        (r"(\d+\s?)+$", "so 7 8\n", 1.0),
        (r"(first|last)", "first" + " " * 4096, 0.0),
    ],
)
def test_a_pattern_is_searched_for_in_the_end_of_an_output(expression: str, text: str, expected: float) -> None:
    assert scored(pattern(expression), text).metrics["reward/format"] == expected
