"""DAPO's dynamic sampling: which groups stay, in which order, and what fills a batch up."""

from __future__ import annotations

import pytest

from pipeline.store import Store
from stages.selection import keep_informative
from stages.tables import Rollouts
from tests.stages.advantage.tables import group, outputs_of, rewards_of

pytestmark = pytest.mark.usefixtures("store")

Draw = dict[str, list[float | None]]
"""Question -> the rewards of its outputs."""


def keep(*draws: Draw, size: int) -> Rollouts:
    rows = [[row for question, rewards in draw.items() for row in group(question, *rewards)] for draw in draws]
    return keep_informative(list(map(outputs_of, rows)), list(map(rewards_of, rows)), size=size)


def keys(outputs: Rollouts) -> list[tuple[str, int]]:
    return [(row["question_id"], row["sample"]) for row in outputs.rows()]


def questions(outputs: Rollouts) -> list[str]:
    return list(dict.fromkeys(question for question, _ in keys(outputs)))


def test_the_first_questions_whose_rewards_differ_stay_in_the_order_drawn() -> None:
    kept = keep({"a": [1, 1], "b": [0, 1]}, {"c": [0, 0], "d": [1, 0], "e": [0, 1]}, size=2)
    assert keys(kept) == [("b", 0), ("b", 1), ("d", 0), ("d", 1)]


def test_the_rows_are_those_that_were_sampled() -> None:
    rows = [*group("a", 1, 1, tokens=3), *group("b", 0, 1, tokens=5)]
    outputs = outputs_of(rows)
    assert keep_informative([outputs], [rewards_of(rows)], size=1).rows() == outputs.rows()[2:]


@pytest.mark.claim("DAPO: dynamic sampling")
def test_groups_that_agree_fill_the_batch_up_behind_those_that_differ() -> None:
    kept = keep({"a": [1, 1], "b": [0, 0]}, {"c": [0, 1]}, size=2)
    assert questions(kept) == ["c", "a"]
    assert kept.metrics["rollout/agreeing_groups"] == 1


def test_nothing_agrees_in_a_batch_of_groups_that_differ() -> None:
    kept = keep({"a": [0, 1], "b": [1, 0], "c": [1, 1]}, size=2)
    assert kept.metrics["rollout/agreeing_groups"] == 0


def test_a_question_drawn_twice_counts_once_and_keeps_its_first_outputs() -> None:
    first, again = group("a", 1, 1, tokens=2), [*group("a", 0, 1, tokens=7), *group("b", 1, 0)]
    kept = keep_informative([outputs_of(first), outputs_of(again)], [rewards_of(first), rewards_of(again)], size=2)
    assert keys(kept) == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert [len(row["output_ids"]) for row in kept.rows()] == [2, 2, 2, 2]
    assert kept.metrics["rollout/agreeing_groups"] == 1


@pytest.mark.claim("0.0 read as missing")
def test_outputs_without_a_reward_make_no_difference() -> None:
    kept = keep({"a": [None, 1], "b": [None, None], "c": [None, 0, 1]}, size=1)
    assert keys(kept) == [("c", 0), ("c", 1), ("c", 2)]


def test_rewards_differ_exactly_without_a_tolerance() -> None:
    assert questions(keep({"a": [0.5, 0.5], "b": [0.5, 0.5 + 1e-12]}, size=1)) == ["b"]


def test_fewer_questions_than_the_batch_has_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 3 questions, found 2"):
        keep({"a": [0, 1]}, {"a": [0, 1], "b": [0, 1]}, size=3)


def test_every_table_of_outputs_needs_its_rewards() -> None:
    rows = group("a", 0, 1)
    with pytest.raises(ValueError, match="found 1 and 2"):
        keep_informative([outputs_of(rows)] * 2, [rewards_of(rows)], size=1)


def test_what_was_sampled_is_counted_over_all_draws(store: Store) -> None:
    rows = [group("a", 1, 1), group("b", 0, 1)]
    drawn = [Drawn(outputs_of(part).digest, number) for number, part in enumerate(rows, 1)]
    kept = keep_informative(list(drawn), list(map(rewards_of, rows)), size=1)
    assert kept.metrics == {
        "rollout/samples": 6,
        "rollout/tokens": 30,
        "rollout/seconds": 1.5,
        "rollout/tokens_per_s": 20,
        "rollout/length_mean": 7,
        "rollout/draws": 2,
        "rollout/agreeing_groups": 0,
    }


class Drawn(Rollouts):
    """Outputs with the metrics that a rollout would have recorded, times `number`; its mean length is that of the first."""

    def __init__(self, digest: str, number: int) -> None:
        super().__init__(digest)
        object.__setattr__(self, "number", number)

    @property
    def metrics(self) -> dict[str, float]:
        count: int = self.__dict__["number"]
        each = {"rollout/samples": 2, "rollout/tokens": 10, "rollout/seconds": 0.5}
        return {name: count * value for name, value in each.items()} | {"rollout/length_mean": 6 + count}
