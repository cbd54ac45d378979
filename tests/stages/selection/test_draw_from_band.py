"""Questions by earlier rewards: which are drawn, in which order the band is refilled, and what counts as seen."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.selection import PassRateBand, draw_from_band
from stages.tables import DataError, Questions, Rewards
from tests.stages.advantage.tables import group, rewards_of

pytestmark = pytest.mark.usefixtures("store")

Step = dict[str, list[float | None]]
"""Question -> the rewards of its outputs; 1 is right."""


def table(step: Step) -> Rewards:
    return rewards_of([row for question, rewards in step.items() for row in group(question, *rewards)])


def batch(names: str, *earlier: Step, size: int, drawn: Step | None = None, step: int = 0, **band: float) -> Questions:
    rows = [{"question_id": name, "question": name, "answer": name, "solution": None} for name in names]
    again = [table(drawn)] if drawn else []
    settings = PassRateBand.parse(band)
    return draw_from_band(
        Questions.write(rows), list(map(table, earlier)), again, settings, size=size, step=step, seed=0
    )


def draw(*args: Any, **settings: Any) -> str:
    return "".join(row["question_id"] for row in batch(*args, **settings).rows())


RATES: Step = {"a": [1, 1], "b": [0, 0], "c": [0, 1]}
"""Of the questions a to d, d is unseen."""


def test_the_band_comes_first_then_what_is_too_hard_then_what_is_solved() -> None:
    assert set(draw("abcd", RATES, size=2)) == {"c", "d"}
    assert draw("abcd", RATES, size=3)[2] == "b"
    assert draw("abcd", RATES, size=4)[3] == "a"


def test_metrics_are_shares_of_the_set_and_of_the_batch(store: Store) -> None:
    assert batch("abcde", RATES | {"e": [1, 0]}, size=4).metrics == {
        "curriculum/band": 2 / 5,
        "curriculum/evicted": 1 / 5,
        "curriculum/unseen": 1 / 5,
        "curriculum/refilled": 1 / 4,
    }


def test_the_band_is_refilled_by_what_is_nearest_to_it() -> None:
    rates: Step = {"a": [0] * 4, "b": [1, 0, 0, 0], "c": [1, 1, 1, 0], "d": [1] * 4, "e": [1, 1, 0, 0]}
    assert draw("abcde", rates, size=5, low=0.5, high=0.5) == "ebacd"


def test_the_borders_belong_to_the_band() -> None:
    rates: Step = {"a": [1, 0, 0, 0], "b": [1, 1, 1, 0]}
    assert batch("ab", rates, size=2, low=0.25, high=0.75).metrics["curriculum/band"] == 1
    assert batch("ab", rates, size=2, low=0.26, high=0.74).metrics["curriculum/band"] == 0


def test_of_a_question_the_last_rewards_count() -> None:
    assert draw("ab", {"a": [1, 1], "b": [0, 1]}, {"a": [0, 1], "b": [1, 1]}, size=1) == "a"
    assert draw("ab", {"a": [0, 1], "b": [1, 1]}, {"a": [1, 1], "b": [0, 1]}, size=1) == "b"


@pytest.mark.parametrize(("unseen", "is_drawn"), [(0.0, False), (0.5, True), (1.0, False)])
def test_an_unseen_question_counts_as_the_rate_that_is_set(unseen: float, is_drawn: bool) -> None:
    found = [draw("ab", {"a": [0, 1]}, size=1, step=step, unseen=unseen) for step in range(8)]
    assert ("b" in found) == is_drawn


def test_outputs_without_a_verdict_say_nothing_of_a_question() -> None:
    judged: Step = {"a": [None, 1], "b": [None, None], "c": [None, 0, 1]}
    assert batch("abc", judged, size=1).metrics == {
        "curriculum/band": 1 / 3,
        "curriculum/evicted": 1 / 3,
        "curriculum/unseen": 1 / 3,
        "curriculum/refilled": 0,
    }
    assert batch("ab", {"a": [0, 1]}, {"a": [None, None]}, size=1).metrics["curriculum/band"] == 1 / 2


def test_rewards_of_other_questions_are_left_out() -> None:
    assert batch("ab", {"z": [1, 1], "a": [1, 1]}, size=1).digest == batch("ab", {"a": [1, 1]}, size=1).digest


def test_what_the_step_has_drawn_comes_after_all_others() -> None:
    assert draw("abcd", RATES, size=3, drawn={"c": [0, 1], "d": [0, 1]})[:2] == "ba"


def test_each_question_of_the_band_has_the_same_chance_by_step() -> None:
    names, mean = string.ascii_letters[:41], 16 * 40 / 40
    found = Counter("".join(draw(names, {"a": [1, 1]}, size=16, step=step) for step in range(40)))
    assert set(found) == {*names} - {"a"}
    assert all(abs(count - mean) < 4 * (mean * 0.6) ** 0.5 for count in found.values())


def test_a_batch_beyond_the_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"1\.\.2 .* found 3"):
        draw("ab", size=3)


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.5), (0.0, 1.0)])
def test_a_band_without_a_meaning_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="low"):
        PassRateBand.parse({"low": low, "high": high})
