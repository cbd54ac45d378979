"""A user's regular expression as the asked form: it may backtrack for ever, and then costs its own outputs their score only."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipeline.residency import resident
from pipeline.workers.pool import KillablePool
from stages.reward import AccuracyConfig, FormatConfig, RewardConfig, score
from stages.reward.functions import call_in_pieces
from stages.reward.rules.format import is_quick, match_pattern
from stages.tables import Rewards, Rollouts
from tests.stages.rows import column, output_row, question_table

pytestmark = [pytest.mark.usefixtures("store"), pytest.mark.filterwarnings("ignore:component 'format'")]

BOMB, NESTED = "a" * 60 + "b", r"(a+)+$"
"""2^60 ways to cut the letters, none of which ends at the end."""


def scored(config: RewardConfig, *texts: str) -> Rewards:
    rows = [output_row("q", sample, text, tokens=1) for sample, text in enumerate(texts)]
    return score(Rollouts.write(rows), question_table(), config)


def pattern(expression: str, *others: Any, **settings: Any) -> RewardConfig:
    form = FormatConfig(form="pattern", pattern=expression)
    return RewardConfig(components=(form, *others), workers=2, deadline_s=0.5, **settings)


def test_a_pattern_that_hangs_on_an_output_costs_that_one_its_score() -> None:
    texts = ["aaa", "b", BOMB, *("a" * count for count in range(4, 24))]
    with pytest.warns(UserWarning, match=r"1 of 23 outputs, such as \('q', 2\)"):
        made = scored(pattern(NESTED), *texts)
    assert column(made, "status") == ["ok", "wrong", "timeout", *["ok"] * 20]
    assert column(made, "reward") == pytest.approx([0.1, 0.0, None, *[0.1] * 20])
    assert made.metrics["reward/faults"] == pytest.approx(1 / 23)


def test_outputs_that_end_alike_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(call: Any, subject: Any, columns: Any, *args: Any, **settings: Any) -> Any:
        asked.extend(columns["texts"])
        return call_in_pieces(call, subject, columns, *args, **settings)

    monkeypatch.setattr("stages.reward.functions.call_in_pieces", spy)
    assert column(scored(pattern(NESTED), *[BOMB] * 30), "status") == ["timeout"] * 30
    assert asked == [BOMB]


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
    started = time.process_time()
    for expression in QUICK:
        match_pattern(expression, {"texts": ["a" * 4096, "1" + " " * 4094 + "x"]})
    assert time.process_time() - started < 0.2 * 2 * len(QUICK)
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
