"""Gauges of a reward model against numbers by hand, and the limits that stop a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.store import Store
from stages.join import JoinError
from stages.reward_model import (
    GaugeConfig,
    GaugeLimits,
    RewardModelError,
    ScoringConfig,
    check_gauges,
    measure_reward_model,
)
from stages.tables import RewardGauges, Rewards, Rollouts
from tests.stages.rows import output_row, reward_row

# question, sample, model score (a logit), rule reward, status, tokens
ROWS = [
    ("a", 0, 2.0, 1.0, "ok", 4),
    ("a", 1, 1.0, 0.0, "wrong", 5),
    ("b", 0, -1.0, 1.0, "ok", 2),
    ("b", 1, -2.0, 0.0, "truncated", 8),
    ("b", 2, 0.5, 0.0, "unparseable", 6),
]


def rewards(values: list[float | None], *, scorer: str | None = None, **changes: Any) -> Rewards:
    return Rewards.write(
        [
            reward_row(row[0], row[1], value, status=row[4], scorer=scorer, components=[])
            | {name: column[place] for name, column in changes.items()}
            for place, (row, value) in enumerate(zip(ROWS, values, strict=True))
        ]
    )


def outputs() -> Rollouts:
    return Rollouts.write([output_row(row[0], row[1], tokens=row[5], logprobs=None) for row in ROWS])


def measured(scores: Rewards | None = None, rules: Rewards | None = None, **scoring: Any) -> RewardGauges:
    scores = scores or rewards([row[2] for row in ROWS], scorer="m")
    rules = rules or rewards([row[3] for row in ROWS])
    return measure_reward_model(scores, rules, outputs(), ScoringConfig(**scoring), GaugeConfig(resamples=100))


def values(gauges: RewardGauges) -> dict[str, float | None]:
    return {row["gauge"]: row["value"] for row in gauges.rows()}


def test_discrimination_is_counted_over_all_rows_and_within_questions(store: Store) -> None:
    found = values(measured())
    assert found["auc"] == pytest.approx((3 + 1) / 6)  # 2.0 is above all three wrong ones, -1.0 above one
    assert found["pair_accuracy"] == pytest.approx((1 + 1) / 3)
    assert found["accuracy"] == pytest.approx(2 / 5)  # 2.0 and -2.0
    assert found["score_mean"] == pytest.approx(0.1)
    assert found["rule_mean"] == pytest.approx(0.4)


def test_correlations_and_length_are_those_of_the_columns(store: Store) -> None:
    found = values(measured())
    # Ranks of score 5 4 2 1 3, of length 2 3 1 5 4, of the rule's reward 4.5 2 4.5 2 2.
    assert found["score_length"] == pytest.approx(-4 / 10)
    assert found["rule_length"] == pytest.approx(-7.5 / math.sqrt(10 * 7.5))
    assert found["length_bias"] == pytest.approx(-0.4 + 7.5 / math.sqrt(75))
    assert found["length_auc"] == 0.0  # both right ones are shorter than every wrong one
    assert found["cut_auc"] == pytest.approx((2 + 2 * 0.5 * 2) / 6)
    assert found["spearman"] == pytest.approx(2.5 / math.sqrt(75))
    x, y = [1.9, 0.9, -1.1, -2.1, 0.4], [0.6, -0.4, 0.6, -0.4, -0.4]
    product = sum(a * b for a, b in zip(x, y, strict=True))
    assert found["pearson"] == pytest.approx(product / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)))


def test_calibration_is_that_of_the_probability_on_either_scale(store: Store) -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    # Bins of a tenth: 0.12 | 0.27 | 0.62 | 0.73 | 0.88, one row each.
    expected = sum(abs(sigmoid(row[2]) - (row[4] == "ok")) for row in ROWS) / 5
    assert values(measured())["ece"] == pytest.approx(expected)
    squeezed = values(measured(rewards([sigmoid(row[2]) for row in ROWS], scorer="m"), scale="sigmoid"))
    assert squeezed["ece"] == pytest.approx(expected)
    assert squeezed["accuracy"] == values(measured())["accuracy"]
    assert squeezed["auc"] == values(measured())["auc"]


def test_steps_are_compared_with_the_labels_of_steps(store: Store) -> None:
    ends = [[1, 3], [4], [1], [7], [5]]
    scores = rewards([row[2] for row in ROWS], step_rewards=[[2.0, -1.0], [1.0], [-1.0], [-2.0], [0.5]], step_ends=ends)
    labels = [[1.0, 0.0], [0.0], [1.0], [0.0], [0.0]]
    rules = rewards([row[3] for row in ROWS], step_rewards=labels, step_ends=ends)
    gauges = measured(scores, rules)
    assert values(gauges)["step_accuracy"] == pytest.approx(3 / 6)
    assert values(gauges)["step_auc"] == pytest.approx((4 + 1.5) / 8)
    assert {row["gauge"]: row["rows"] for row in gauges.rows()}["step_auc"] == 6
    shifted = rewards([row[3] for row in ROWS], step_rewards=labels, step_ends=[[0, 3], *ends[1:]])
    with pytest.raises(ValueError, match=r"\('a', 0\): .*\[1, 3\].*\[0, 3\]"):
        measured(scores, shifted)


def test_gauges_and_intervals_are_metrics_too(store: Store) -> None:
    gauges = measured()
    (auc,) = (row for row in gauges.rows() if row["gauge"] == "auc")
    assert gauges.metrics["rm/auc"] == auc["value"]
    assert (gauges.metrics["rm/auc_low"], gauges.metrics["rm/auc_high"]) == (auc["low"], auc["high"])
    assert auc["low"] <= auc["value"] <= auc["high"]
    assert "rm/step_auc" not in gauges.metrics  # there are no steps


def test_rows_without_a_verdict_do_not_count(store: Store) -> None:
    statuses = ["ok", "wrong", "timeout", "error", "wrong"]
    rules = rewards([1.0, 0.0, None, None, 0.0], status=statuses)
    gauges = measured(rules=rules)
    assert {row["rows"] for row in gauges.rows() if not row["gauge"].startswith("step")} == {3}
    assert values(gauges)["auc"] == 1.0


def test_where_all_are_right_what_compares_is_undefined(store: Store) -> None:
    rules = rewards([1.0] * 5, status=["ok"] * 5)
    found = values(measured(rules=rules))
    undefined = {name for name, value in found.items() if value is None}
    assert {"auc", "pair_accuracy", "pearson", "spearman", "length_bias"} <= undefined
    assert found["accuracy"] == pytest.approx(3 / 5)
    check_gauges(measured(rules=rules), GaugeLimits(min_auc=0.9, min_correlation=0.9, max_length_bias=0.0))


def test_scores_of_other_rollouts_are_refused(store: Store) -> None:
    rules = Rewards.write(rewards([row[3] for row in ROWS]).rows()[:-1])
    with pytest.raises(JoinError) as refused:
        measured(rules=rules)
    assert (refused.value.table, refused.value.missing) == ("rule rewards", ("b", 2))


def test_limits_stop_a_run_with_gauge_value_and_limit(store: Store) -> None:
    gauges = measured()
    check_gauges(gauges, GaugeLimits())
    check_gauges(gauges, GaugeLimits(min_auc=0.6, min_correlation=0.2, max_length_bias=0.7))
    with pytest.raises(RewardModelError, match=r"auc 0\.667 is below min_auc=0\.7\. Train it on"):
        check_gauges(gauges, GaugeLimits(min_auc=0.7))
    message = r"pearson 0\.\d+ is below min_correlation=0\.9; length_bias \+0\.466 is beyond max_length_bias=0\.1"
    with pytest.raises(RewardModelError, match=message):
        check_gauges(gauges, GaugeLimits(min_correlation=0.9, max_length_bias=0.1))
