"""The advantage stage: joined by key, one value per token, masked rows in their slot."""

from __future__ import annotations

import random

import pytest

from stages.advantage import AdvantageConfig, estimate_advantages
from stages.tables import Rewards, Rollouts

pytestmark = pytest.mark.usefixtures("store")


def tables(
    rows: list[tuple[str, int, float | None, int]], *, shuffle_rewards: bool = False, cut: tuple[int, ...] = ()
) -> tuple[Rewards, Rollouts]:
    """Rows of (question, sample, reward, tokens); status `ok` where the reward is 1."""
    scored = [
        {
            "question_id": question_id,
            "sample": sample,
            "reward": reward,
            "status": "error" if reward is None else "ok" if reward == 1 else "wrong",
            "extracted": None,
            "components": [("accuracy", reward)],
        }
        for question_id, sample, reward, _ in rows
    ]
    sampled = [
        {
            "question_id": question_id,
            "sample": sample,
            "prompt_ids": [1],
            "output_ids": list(range(tokens)),
            "logprobs": [0.0] * tokens,
            "finish_reason": "length" if index in cut else "stop",
            "text": "",
            "temperature": 1.0,
            "seed": 0,
        }
        for index, (question_id, sample, _, tokens) in enumerate(rows)
    ]
    if shuffle_rewards:
        random.Random(0).shuffle(scored)
    return Rewards.write(scored), Rollouts.write(sampled)


LONE_WINNER = [("a", 0, 1.0, 3), ("a", 1, 0.0, 1), ("a", 2, 0.0, 2), ("a", 3, 0.0, 0)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_output_token_has_the_advantage_of_its_output(shuffle: bool) -> None:
    rewards, outputs = tables(LONE_WINNER, shuffle_rewards=shuffle)
    made = estimate_advantages(rewards, outputs, AdvantageConfig())
    assert [row["advantage"] for row in made.rows()] == [[1.5] * 3, [-0.5], [-0.5] * 2, []]
    assert [(row["question_id"], row["sample"]) for row in made.rows()] == [("a", i) for i in range(4)]


def test_groups_are_questions_even_when_their_rows_alternate() -> None:
    rewards, outputs = tables([("a", 0, 0.0, 1), ("b", 0, 1.0, 1), ("a", 1, 2.0, 1), ("b", 1, 1.0, 1)])
    made = estimate_advantages(rewards, outputs, AdvantageConfig(ddof=0))
    assert [row["advantage"] for row in made.rows()] == [[-1.0], [0.0], [1.0], [0.0]]


def test_a_row_without_reward_is_null_and_does_not_move_the_others() -> None:
    rewards, outputs = tables([*LONE_WINNER, ("a", 4, None, 2)])
    made = estimate_advantages(rewards, outputs, AdvantageConfig())
    assert [row["advantage"] for row in made.rows()] == [[1.5] * 3, [-0.5], [-0.5] * 2, [], None]
    assert made.metrics["reward/frac_masked"] == 0.2


def test_a_truncated_row_may_be_masked_and_still_counts_in_the_statistics() -> None:
    rewards, outputs = tables(LONE_WINNER, cut=(1,))
    made = estimate_advantages(rewards, outputs, AdvantageConfig(truncated="mask"))
    assert [row["advantage"] for row in made.rows()] == [[1.5] * 3, None, [-0.5] * 2, []]


def test_the_metrics_describe_the_groups() -> None:
    rows = [("a", 0, 1.0, 1), ("a", 1, 1.0, 1), ("b", 0, 0.0, 1), ("b", 1, 0.0, 1)]
    rows += [("c", 0, 1.0, 1), ("c", 1, 0.0, 1), ("d", 0, 0.5, 1), ("d", 1, 0.5, 1)]
    rewards, outputs = tables(rows)
    metrics = estimate_advantages(rewards, outputs, AdvantageConfig()).metrics
    assert metrics["reward/frac_degenerate_groups"] == 0.75
    assert metrics["reward/frac_all_correct"] == 0.25
    assert metrics["reward/frac_all_wrong"] == 0.5
    assert metrics["reward/std_within_group"] == pytest.approx(0.5**0.5 / 4)


def test_a_single_output_per_question_is_refused_by_name() -> None:
    rewards, outputs = tables([("a", 0, 1.0, 1), ("a", 1, 0.0, 1), ("solo", 0, 1.0, 1)])
    with pytest.raises(ValueError, match=r"'solo' has one output.*G >= 2"):
        estimate_advantages(rewards, outputs, AdvantageConfig())


def test_rewards_of_other_rows_are_refused_with_an_example() -> None:
    rewards, _ = tables(LONE_WINNER)
    _, outputs = tables([*LONE_WINNER, ("a", 9, 0.0, 1)])
    with pytest.raises(ValueError, match=r"1 outputs without a reward row.*\('a', 9\)"):
        estimate_advantages(rewards, outputs, AdvantageConfig())
