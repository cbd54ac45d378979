"""Evaluation: accuracy, Pass@K and Maj@K of small tables counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from stages.evaluation import EvaluationConfig, evaluate
from stages.tables import Evaluation, Rewards, Rollouts

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
NO_STEPS = {"step_rewards": None, "step_ends": None, "scorer": None}


def tables(rows: list[tuple[str, str, str | None, int]]) -> tuple[Rollouts, Rewards]:
    sampled: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for index, (question_id, status, extracted, tokens) in enumerate(rows):
        key = {"question_id": question_id, "sample": index}
        sampled.append(
            key
            | {"prompt_ids": [1], "output_ids": [2] * tokens, "logprobs": [0.0] * tokens, "text": ""}
            | {"text_ends": [0] * tokens}
            | {"finish_reason": "length" if status == "truncated" else "stop", "temperature": 1.0, "seed": 0}
        )
        reward = {"reward": float(status == "ok"), "status": status, "extracted": extracted}
        scored.append(key | reward | {"components": [("accuracy", float(status == "ok"))]} | NO_STEPS)
    return Rollouts.write(sampled), Rewards.write(list(reversed(scored)))


def evaluated(ks: tuple[int, ...] = (1, 2, 4)) -> Evaluation:
    outputs, rewards = tables(ROWS)
    return evaluate(outputs, rewards, EvaluationConfig(ks=ks))


def test_accuracy_is_the_mean_over_questions_of_the_share_of_right_samples() -> None:
    metrics = evaluated().metrics
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert metrics["pass_at_1"] == pytest.approx(metrics["accuracy"])
    assert metrics["maj_at_1"] == pytest.approx(metrics["accuracy"])
    assert metrics["accuracy_ci_low"] <= metrics["accuracy"] <= metrics["accuracy_ci_high"]


def test_pass_at_2_is_counted_over_all_pairs() -> None:
    # a: of 6 pairs one (the two that are not right) misses: 5/6; b: of 6 pairs 3 hold the right one: 1/2.
    assert evaluated().metrics["pass_at_2"] == pytest.approx((5 / 6 + 1 / 2) / 2)


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


def test_a_k_above_the_samples_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"k = 8 .*has 4: sample more outputs or lower `ks`"):
        evaluated(ks=(8,))


def test_rewards_of_other_outputs_are_refused() -> None:
    outputs, _ = tables(ROWS)
    _, rewards = tables(ROWS[:-1])
    with pytest.raises(ValueError, match=r"not of the same rows, for example \('b', 7\)"):
        evaluate(outputs, rewards, EvaluationConfig())
