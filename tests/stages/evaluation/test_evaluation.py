"""Evaluation: accuracy, Pass@K and Maj@K of small tables counted by hand, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stages.evaluation import EvaluationConfig, evaluate
from stages.join import JoinError
from stages.reward import AccuracyConfig, RewardConfig, count_votes
from stages.tables import Evaluation, Rewards, Rollouts
from tests.stages.rows import output_row, reward_row

pytestmark = pytest.mark.usefixtures("store")

# (question, status, extracted answer, tokens)
ROWS = [
    ("a", "ok", "1/2", 4),
    ("a", "ok", "0.5", 6),
    ("a", "wrong", "3", 5),
    ("a", "unparseable", None, 5),
    ("b", "wrong", "7", 5),
    ("b", "wrong", "7", 5),
    ("b", "ok", "8", 5),
    ("b", "truncated", None, 9),
]
Row = tuple[str, str, str | None, int]
EXACT = RewardConfig(components=(AccuracyConfig(verifier="exact"),))


def tables(rows: Sequence[Row], cut: Sequence[int] = ()) -> tuple[Rollouts, Rewards]:
    sampled, scored = [], []
    for index, (question_id, status, extracted, tokens) in enumerate(rows):
        is_cut = status == "truncated" or index in cut
        sampled.append(output_row(question_id, index, tokens=tokens, cut=is_cut))
        scored.append(reward_row(question_id, index, float(status == "ok"), status=status, extracted=extracted))
    return Rollouts.write(sampled), Rewards.write(list(reversed(scored)))


def evaluated(
    ks: tuple[int, ...] = (1, 2, 4), rows: Sequence[Row] = ROWS, cut: Sequence[int] = (), **settings: Any
) -> Evaluation:
    outputs, rewards = tables(rows, cut)
    return evaluate(
        outputs,
        rewards,
        count_votes(rewards, EXACT),
        EvaluationConfig(ks=ks, **{"bootstrap_resamples": 100} | settings),
    )


def test_accuracy_is_the_mean_over_questions_of_the_share_of_right_samples() -> None:
    metrics = evaluated().metrics
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert metrics["pass_at_1"] == pytest.approx(metrics["accuracy"])
    assert metrics["maj_at_1"] == pytest.approx(metrics["accuracy"])
    assert metrics["accuracy_ci_low"] <= metrics["accuracy"] <= metrics["accuracy_ci_high"]


def test_questions_weigh_alike_however_many_samples_they_have() -> None:
    rows: list[Row] = [("a", "ok", "1", 1), ("a", "wrong", "2", 1), *[("b", "ok", "1", 1)] * 5, ("b", "wrong", "2", 1)]
    metrics = evaluated((1, 2), rows).metrics
    assert metrics["accuracy"] == metrics["pass_at_1"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert metrics["pass_at_2"] == 1.0
    assert metrics["maj_at_2"] == pytest.approx((1 / 2 + (10 + 5 / 2) / 15) / 2)  # of 15 pairs ten agree, five are ties


@pytest.mark.claim("Pass@K of the first K")
def test_right_answers_vote_together_and_wrong_ones_by_their_answer() -> None:
    # All four samples: a has 2 votes for the right answer against 1; b has 1 against 2.
    made = evaluated()
    assert made.metrics["maj_at_4"] == pytest.approx(0.5)
    assert [row["majority_correct"] for row in made.rows()] == [True, False]


def test_the_table_counts_samples_and_statuses_per_question() -> None:
    rows = evaluated().rows()
    assert [(row["question_id"], row["samples"], row["correct"]) for row in rows] == [("a", 4, 2), ("b", 4, 1)]
    assert rows[1]["status_counts"] == [("ok", 1), ("truncated", 1), ("wrong", 2)]


def test_rates_and_lengths_are_of_all_outputs() -> None:
    metrics = evaluated().metrics
    assert metrics["truncated_rate"] == 1 / 8
    assert metrics["unparseable_rate"] == 1 / 8
    assert metrics["no_verdict_rate"] == 0.0
    assert metrics["length_mean"] == 44 / 8


def test_a_k_is_compared_with_the_question_of_the_fewest_samples() -> None:
    rows: list[Row] = [*[("a", "ok", "1", 1)] * 6, *[("b", "ok", "1", 1)] * 2, *[("c", "ok", "1", 1)] * 4]
    with pytest.raises(ValueError, match=r"k = 3 .*'b' has 2: sample more"):
        evaluated((2, 3), rows)
    assert evaluated((2,), rows).metrics["pass_at_2"] == 1.0


def test_rewards_of_other_outputs_are_refused() -> None:
    outputs, _ = tables(ROWS)
    _, rewards = tables(ROWS[:-1])
    with pytest.raises(JoinError) as refused:
        evaluate(outputs, rewards, count_votes(rewards, EXACT), EvaluationConfig())
    assert (refused.value.table, refused.value.missing) == ("rewards", ("b", 7))


def test_votes_of_other_rewards_are_refused() -> None:
    outputs, rewards = tables(ROWS)
    _, others = tables([("a", "ok", "1", 1), *ROWS[1:3], ("a", "ok", "1", 1), *ROWS[4:]])
    with pytest.raises(ValueError, match=r"'a' .*\(4, 2\) .*\(4, 3\)"):
        evaluate(outputs, rewards, count_votes(others, EXACT), EvaluationConfig())


@pytest.mark.parametrize(
    ("answers", "majority"),
    [
        (["ok", "ok", "7", "8"], True),
        (["ok", "ok", "7", "7"], False),  # a tie is not a majority
        (["ok", "7", None, None], False),
        (["ok", None, None, None], True),
        ([None, None, None, None], False),
        (["ok", "7", "8", "9"], False),
        (["ok", "7", "7.0", "9"], False),
    ],
)
def test_a_majority_has_more_votes_than_any_other_answer(answers: list[str | None], majority: bool) -> None:
    rows: list[Row] = [
        ("a", "ok" if answer == "ok" else "unparseable" if answer is None else "wrong", answer, 1) for answer in answers
    ]
    found = {row["question_id"]: row["majority_correct"] for row in evaluated((1,), [*rows, *ROWS[4:]]).rows()}
    assert found == {"a": majority, "b": False}


def test_timeouts_and_errors_are_without_verdict_and_nothing_else_is() -> None:
    statuses = ["ok", "wrong", "unparseable", "truncated", "timeout", "error", "error", "ok"]
    rows: list[Row] = [("a", status, "3" if status in ("ok", "wrong") else None, 1) for status in statuses]
    metrics = evaluated((1,), rows).metrics
    assert metrics["no_verdict_rate"] == 3 / 8
    assert (metrics["unparseable_rate"], metrics["truncated_rate"]) == (1 / 8, 1 / 8)


def test_a_truncated_output_that_was_scored_as_it_is_counts_as_truncated() -> None:
    rows: list[Row] = [("a", "ok", "1", 1), ("a", "wrong", "2", 1), ("a", "unparseable", None, 1), ("a", "ok", "1", 1)]
    metrics = evaluated((1,), rows, cut=(0, 1)).metrics
    assert metrics["truncated_rate"] == 2 / 4
    assert metrics["accuracy"] == 2 / 4


# ------------------------------------------------------------------------------------------------ votes that are not known


@pytest.mark.claim("majorities over spellings")
@pytest.mark.parametrize(
    "rows",
    [
        [("a", "wrong", None, 1)] * 3 + [("a", "ok", "1", 1)],
        [("a", "ok", None, 1)] * 4,  # a reward function: right, and nothing was read
        [("a", "unparseable", None, 1)] * 4,
        [("a", "wrong", "7", 1), ("a", "wrong", None, 1)],
        [("a", "ok", "1", 1)] * 2 + [("b", "wrong", None, 1), ("b", "ok", "1", 1)],
    ],
    ids=["wrong without an answer", "no answer at all", "no answer in any output", "one of two", "one question of two"],
)
def test_where_votes_are_not_known_maj_at_k_is_undefined(rows: list[Row]) -> None:
    made = evaluated((1, 2), rows)
    assert not [name for name in made.metrics if name.startswith("maj")]
    assert {"pass_at_1", "pass_at_2", "accuracy"} <= made.metrics.keys()
    assert made.rows()[-1]["majority_correct"] is None


def test_an_output_without_a_verdict_does_not_hide_the_votes_of_others() -> None:
    rows: list[Row] = [("a", "ok", "1", 1), ("a", "timeout", None, 1), ("a", "error", None, 1)]
    assert evaluated((1, 3), rows).metrics["maj_at_3"] == 1.0


# ------------------------------------------------------------------------------------------------ intervals


def by_hand(shares: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """The percentile bootstrap, sorted and interpolated without numpy's quantile."""
    rng = np.random.default_rng(seed)
    means = sorted(
        math.fsum(shares[i] for i in rng.integers(0, len(shares), len(shares))) / len(shares) for _ in range(resamples)
    )

    def quantile(share: float) -> float:
        place = share * (len(means) - 1)
        below = math.floor(place)
        return means[below] + (place - below) * (means[min(below + 1, len(means) - 1)] - means[below])

    return quantile(0.025), quantile(0.975)


# Eight questions of four samples: shares 0, 1/4, 2/4, 3/4 and 1 of them right.
SHARES = [0, 1, 1, 2, 2, 3, 3, 4]
MANY: list[Row] = [
    (f"q{number}", "ok" if sample < right else "wrong", "1" if sample < right else "2", 1)
    for number, right in enumerate(SHARES)
    for sample in range(4)
]


@pytest.mark.parametrize("seed", [0, 5])
def test_the_interval_of_accuracy_is_that_of_questions_drawn_by_the_seed(seed: int) -> None:
    metrics = evaluated((1,), MANY, seed=seed, bootstrap_resamples=300).metrics
    low, high = by_hand([right / 4 for right in SHARES], 300, seed)
    assert (metrics["accuracy_ci_low"], metrics["accuracy_ci_high"]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.claim("intervals over samples")
def test_samples_of_one_question_are_not_resampled_apart() -> None:
    """Two questions, one all right and one all wrong: a resample of questions is 0, 1/2 or 1, whatever the samples."""
    rows: list[Row] = [("a", "ok", "1", 1)] * 50 + [("b", "wrong", "2", 1)] * 50
    metrics = evaluated((1,), rows).metrics
    assert (metrics["accuracy_ci_low"], metrics["accuracy_ci_high"]) == (0.0, 1.0)


def test_pass_at_k_and_maj_at_k_have_the_interval_over_questions() -> None:
    metrics = evaluated((2, 4), MANY, bootstrap_resamples=300).metrics
    # Of c right among 4: Pass@2 = 1 - C(4 - c, 2) / 6; Maj@4 is 0, 0, 1/2, 1, 1.
    expected = {"pass_at_2": [0, 3 / 6, 5 / 6, 1, 1], "maj_at_4": [0, 0, 0.5, 1, 1]}
    for name, by_right in expected.items():
        shares = [by_right[right] for right in SHARES]
        found = [metrics[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high")]
        assert found == pytest.approx([sum(shares) / 8, *by_hand(shares, 300, 0)], abs=1e-12)


@pytest.mark.claim("intervals over samples")
@pytest.mark.parametrize("right", [True, False])
def test_a_set_that_is_all_right_or_all_wrong_has_wilsons_interval(right: bool) -> None:
    status, answer = ("ok", "1") if right else ("wrong", "2")
    rows: list[Row] = [(f"q{number}", status, answer, 1) for number in range(10) for _ in range(2)]
    metrics = evaluated((2,), rows).metrics
    edge = 1.959964**2 / (10 + 1.959964**2)  # of ten questions, not of twenty samples
    expected = (1 - edge, 1.0) if right else (0.0, edge)
    for name in ("accuracy", "pass_at_2", "maj_at_2"):
        assert (metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]) == pytest.approx(expected, abs=1e-6), name


def test_the_mean_length_is_of_what_the_policy_wrote() -> None:
    turns = [{"start": 0, "end": 2}, {"start": 5, "end": 6}]
    rows = [output_row("a", 0, tokens=6, turns=turns), output_row("a", 1, tokens=4, turns=None)]
    rewards = Rewards.write([reward_row("a", sample, 1.0, extracted="1") for sample in range(2)])
    made = evaluate(Rollouts.write(rows), rewards, count_votes(rewards, EXACT), EvaluationConfig())
    assert made.metrics["length_mean"] == (3 + 4) / 2
