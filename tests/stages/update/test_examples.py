"""From tables to examples: joined by key, merged by content, dealt by question."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.store import Store
from stages.join import JoinError
from stages.tables import Advantages, Rollouts
from stages.training.batching import deal
from stages.update.loss import Example, drop_idle
from stages.update.stage import join, merge_equal, pair_up


def outputs_of(*rows: tuple[str, int, list[int]]) -> Rollouts:
    return Rollouts.write([rollout_row(question, sample, ids) for question, sample, ids in rows])


def rollout_row(question: str, sample: int, ids: list[int]) -> dict[str, Any]:
    return {
        "question_id": question,
        "sample": sample,
        "prompt_ids": [1, 2],
        "output_ids": ids,
        "logprobs": [-1.0] * len(ids),
        "finish_reason": "stop",
        "text": "",
        "text_ends": [0] * len(ids),
        "temperature": 1.0,
        "seed": 0,
    }


def advantages_of(*rows: tuple[str, int, list[float] | None]) -> Advantages:
    return Advantages.write([advantage_row(q, s, a) for q, s, a in rows])


def advantage_row(question: str, sample: int, advantage: list[float] | None, pair: int | None = None) -> dict[str, Any]:
    return {"question_id": question, "sample": sample, "advantage": advantage, "returns": None, "pair": pair}


def example(question: str, ids: tuple[int, ...], advantage: float, weight: float = 1.0) -> Example:
    return Example(question, (1, 2), ids, (advantage,) * len(ids), weight)


@pytest.mark.claim("joined by position")
def test_advantages_are_joined_by_key_whatever_their_order(store: Store) -> None:
    outputs = outputs_of(("a", 0, [5]), ("a", 1, [6, 7]))
    joined = join(outputs, advantages_of(("a", 1, [-1.0, -1.0]), ("a", 0, [1.0])))
    assert [(e.output_ids, e.advantage) for e in joined] == [((5,), (1.0,)), ((6, 7), (-1.0, -1.0))]


def test_a_masked_row_takes_no_part(store: Store) -> None:
    joined = join(outputs_of(("a", 0, [5]), ("a", 1, [6])), advantages_of(("a", 0, None), ("a", 1, [1.0])))
    assert [e.output_ids for e in joined] == [(6,)]


def test_advantages_of_other_rollouts_are_refused_by_key(store: Store) -> None:
    with pytest.raises(JoinError) as refused:
        join(outputs_of(("a", 1, [5])), advantages_of(("a", 0, [1.0])))
    assert (refused.value.table, refused.value.missing) == ("advantages", ("a", 1))


def test_advantages_of_another_length_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"\('a', 0\).*expected 2 advantages.* found 1"):
        join(outputs_of(("a", 0, [5, 6])), advantages_of(("a", 0, [1.0])))


def test_nothing_is_left_where_every_row_is_masked(store: Store) -> None:
    assert join(outputs_of(("a", 0, [5])), advantages_of(("a", 0, None))) == []
    assert deal([], mini_batches=3, seed=0) == [[], [], []]


def test_equal_outputs_merge_within_a_question_only() -> None:
    rows = [example("a", (5,), 1.0), example("b", (5,), 1.0), example("a", (5,), 1.0), example("a", (6,), 1.0)]
    assert merge_equal(rows) == [
        example("a", (5,), 1.0, weight=2.0),
        example("b", (5,), 1.0),
        example("a", (6,), 1.0),
    ]


def test_equal_outputs_of_different_advantage_stay_apart() -> None:
    rows = [example("a", (5,), 1.0), example("a", (5,), 0.5)]
    assert merge_equal(rows) == rows


def test_only_rows_of_zero_advantage_are_idle() -> None:
    rows = [example("a", (5,), 0.0), example("a", (6,), -0.1)]
    assert drop_idle(rows) == rows[1:]


def test_a_row_that_stands_for_several_brings_their_weight_into_a_merger() -> None:
    rows = [example("a", (5,), 1.0, weight=3.0), example("a", (5,), 1.0, weight=3.0), example("a", (6,), 1.0)]
    assert [merged.weight for merged in merge_equal(rows)] == [6.0, 1.0]


@pytest.mark.parametrize("advantage", [(0.0, 1.0), (-1.0, 0.0), (1.0, 1.0)])
def test_a_row_with_one_advantage_that_is_not_zero_is_not_idle(advantage: tuple[float, ...]) -> None:
    row = dataclasses.replace(example("a", (5, 6), 0.0), advantage=advantage)
    assert drop_idle([row, dataclasses.replace(row, advantage=(0.0, 0.0))]) == [row]


def test_questions_are_dealt_by_the_seed() -> None:
    rows = [example(question, (5,), 1.0) for question in "abcdefgh"]
    dealt = {tuple(e.question_id for e in deal(rows, mini_batches=2, seed=seed)[0]) for seed in range(8)}
    assert len(dealt) > 4
    assert deal(rows, mini_batches=2, seed=5) == deal(rows, mini_batches=2, seed=5)


@pytest.mark.claim("the last batch dropped or counted twice")
def test_mini_batches_hold_whole_groups_and_every_example_once() -> None:
    rows = [example(question, (token,), 1.0) for question in "abcde" for token in range(3)]
    hands = deal(rows, mini_batches=2, seed=3)
    questions = [{e.question_id for e in hand} for hand in hands]
    assert questions[0].isdisjoint(questions[1])
    assert sorted(map(repr, hands[0] + hands[1])) == sorted(map(repr, rows))
    assert sorted(map(len, questions)) == [2, 3]


def test_more_mini_batches_than_questions_leave_the_last_ones_empty() -> None:
    rows = [example("a", (5,), 1.0), example("a", (6,), 1.0)]
    assert deal(rows, mini_batches=3, seed=0) == [rows, [], []]


def test_advantages_without_an_output_are_refused_by_key(store: Store) -> None:
    with pytest.raises(JoinError) as refused:
        join(outputs_of(("a", 0, [5])), advantages_of(("a", 0, [1.0]), ("a", 1, [1.0])))
    assert (refused.value.missing, refused.value.extra) == (None, ("a", 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_advantage_that_is_not_finite_is_refused_by_row_and_token(store: Store, bad: float) -> None:
    with pytest.raises(ValueError, match=r"output \('a', 1\): advantages must be finite, found (nan|inf) at token 1"):
        join(outputs_of(("a", 0, [5]), ("a", 1, [6, 7])), advantages_of(("a", 0, [1.0]), ("a", 1, [1.0, bad])))


@pytest.mark.claim("NaN of the engine becomes 0")
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_rollout_logprob_that_is_not_finite_is_refused_where_it_is_read(store: Store, bad: float) -> None:
    outputs = Rollouts.write([rollout_row("a", 0, [5]) | {"logprobs": [bad]}])
    assert len(join(outputs, advantages_of(("a", 0, [1.0])))) == 1
    with pytest.raises(ValueError, match=r"output \('a', 0\): rollout log-probabilities must be finite"):
        join(outputs, advantages_of(("a", 0, [1.0])), with_logprobs=True)


def test_outputs_that_no_engine_sampled_have_no_logprobs_to_read(store: Store) -> None:
    outputs = Rollouts.write([rollout_row("a", 0, [5]) | {"logprobs": None}])
    with pytest.raises(ValueError, match=r"output \('a', 0\) has no rollout log-probabilities"):
        join(outputs, advantages_of(("a", 0, [1.0])), with_logprobs=True)


def preference(pair: int | None, sign: float) -> Example:
    return Example("a", (1,), (5, 6), (sign, sign), 1.0, None, pair)


def test_the_two_of_a_pair_stand_side_by_side_the_preferred_first() -> None:
    ordered = pair_up([preference(1, -1.0), preference(0, 1.0), preference(1, 1.0), preference(0, -1.0)])
    assert [(e.pair, e.advantage[0]) for e in ordered] == [(1, 1.0), (1, -1.0), (0, 1.0), (0, -1.0)]


@pytest.mark.parametrize(
    "members",
    [[preference(0, 1.0)], [preference(0, 1.0), preference(0, 1.0)], [preference(0, 0.5), preference(0, -1.0)]],
)
def test_a_pair_is_one_preferred_and_one_other_output(members: list[Example]) -> None:
    with pytest.raises(ValueError, match="pair 0: expected one output with advantage 1 and one with -1"):
        pair_up(members)


def test_a_preference_objective_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"belongs to no pair.*advantage.kind=pairs"):
        pair_up([preference(None, 1.0)])
