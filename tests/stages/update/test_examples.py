"""From tables to examples: joined by key, merged by content, dealt by question."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.store import Store
from stages.join import JoinError
from stages.tables import Advantages, Rollouts
from stages.training.batching import deal
from stages.update.loss import Example, drop_idle
from stages.update.stage import join, merge_equal, pair_up
from tests.stages.rows import advantage_row, rollout_row


def outputs_of(*rows: tuple[str, int, list[int]]) -> Rollouts:
    return Rollouts.write([rollout_row(question, sample, ids) for question, sample, ids in rows])


def advantages_of(*rows: tuple[str, int, list[float] | None]) -> Advantages:
    return Advantages.write([advantage_row(q, s, a) for q, s, a in rows])


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
    assert join(outputs_of(("a", 0, [5])), advantages_of(("a", 0, None))) == []
    assert deal([], mini_batches=3, seed=0) == [[], [], []]


def test_equal_outputs_merge_within_a_question_only() -> None:
    same, elsewhere = example("a", (5,), 1.0, weight=3.0), example("b", (5,), 1.0, weight=3.0)
    others = [example("a", (6,), 1.0), example("a", (5,), 0.5)]  # another output, another advantage
    assert merge_equal([same, elsewhere, same, *others]) == [
        example("a", (5,), 1.0, weight=6.0),
        elsewhere,
        *others,
    ]


@pytest.mark.parametrize("advantage", [(0.0, 1.0), (-0.1, 0.0), (1.0, 1.0)])
def test_only_rows_of_zero_advantage_are_idle(advantage: tuple[float, ...]) -> None:
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
    assert deal(rows[:3], mini_batches=3, seed=0) == [rows[:3], [], []]  # more than there are questions


def test_advantages_that_do_not_fit_the_outputs_are_refused_by_key(store: Store) -> None:
    outputs = outputs_of(("a", 0, [5]))
    with pytest.raises(JoinError) as refused:
        join(outputs, advantages_of(("a", 0, [1.0]), ("a", 1, [1.0])))
    assert (refused.value.table, refused.value.missing, refused.value.extra) == ("advantages", None, ("a", 1))
    with pytest.raises(ValueError, match=r"\('a', 0\).* 1 .* 2$"):
        join(outputs, advantages_of(("a", 0, [1.0, 1.0])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_advantage_that_is_not_finite_is_refused_by_row_and_token(store: Store, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"\('a', 1\).* {bad} at token 1"):
        join(outputs_of(("a", 0, [5]), ("a", 1, [6, 7])), advantages_of(("a", 0, [1.0]), ("a", 1, [1.0, bad])))


@pytest.mark.claim("NaN of the engine becomes 0")
@pytest.mark.parametrize("bad", [[float("nan")], [float("-inf")], None])
def test_a_rollout_logprob_that_is_not_finite_is_refused_where_it_is_read(
    store: Store, bad: list[float] | None
) -> None:
    outputs, advantages = Rollouts.write([rollout_row("a", 0, [5], logprobs=bad)]), advantages_of(("a", 0, [1.0]))
    assert len(join(outputs, advantages)) == 1
    with pytest.raises(ValueError, match=r"\('a', 0\).*rollout log-probabilities"):
        join(outputs, advantages, with_logprobs=True)


def preference(pair: int | None, sign: float) -> Example:
    return Example("a", (1,), (5, 6), (sign, sign), 1.0, None, pair)


def test_the_two_of_a_pair_are_adjacent_the_preferred_first() -> None:
    ordered = pair_up([preference(1, -1.0), preference(0, 1.0), preference(1, 1.0), preference(0, -1.0)])
    assert [(e.pair, e.advantage[0]) for e in ordered] == [(1, 1.0), (1, -1.0), (0, 1.0), (0, -1.0)]


@pytest.mark.parametrize(
    "members",
    [[preference(0, 1.0)], [preference(0, 1.0), preference(0, 1.0)], [preference(0, 0.5), preference(0, -1.0)]],
)
def test_a_pair_is_one_preferred_and_one_other_output(members: list[Example]) -> None:
    with pytest.raises(ValueError, match="pair 0"):
        pair_up(members)


def test_a_preference_objective_needs_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        pair_up([preference(None, 1.0)])
