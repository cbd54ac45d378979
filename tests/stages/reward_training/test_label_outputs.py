"""Labels are the verdicts of the rules, row by row; what has no verdict has no label."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.store import Store
from stages.models import vocabulary_of
from stages.reward_training import label_outputs
from stages.tables import Rewards
from tests.stages.reward_training.worlds import label_rows, outputs_of, rules_of
from tests.stages.training.tiny import tiny_checkpoint


def changed(rules: Rewards, **by_place: dict[str, Any]) -> Rewards:
    rows = rules.rows()
    for place, change in by_place.items():
        rows[int(place[1:])] |= change
    return Rewards.write(rows)


def test_a_label_is_the_verdict_with_the_last_token_to_read_it_at(store: Store) -> None:
    policy = tiny_checkpoint()
    rows = label_rows(policy)
    made = label_outputs(outputs_of(rows), rules_of(rows), policy)
    assert made.rows() == rows
    assert made.rows()[0]["origin"] == policy.digest
    assert made.rows()[0]["vocabulary"] == vocabulary_of(policy)
    assert made.metrics["rm/labelled"] == 16
    assert made.metrics["rm/left_out"] == 0
    assert made.metrics["rm/right_share"] == 10 / 16
    steps = [label for row in rows for label in row["step_labels"]]
    assert made.metrics["rm/right_steps_share"] == pytest.approx(sum(steps) / len(steps))


@pytest.mark.claim("preference pairs in place of rule labels")
@pytest.mark.parametrize(
    ("status", "reward", "label"),
    [
        ("ok", 1.0, 1.0),
        ("ok", 0.3, 1.0),  # a weighted sum of components: the verdict counts, not the reward
        ("wrong", 0.2, 0.0),
        ("unparseable", 0.0, 0.0),
        ("truncated", 0.0, 0.0),
        ("truncated", None, None),
        ("timeout", None, None),
        ("timeout", 0.0, None),
        ("error", None, None),
        ("ok", None, None),
    ],
)
def test_each_status_has_its_label_or_none(
    store: Store, status: str, reward: float | None, label: float | None
) -> None:
    policy = tiny_checkpoint()
    rows = label_rows(policy)
    rules = changed(rules_of(rows), _3={"status": status, "reward": reward})
    made = label_outputs(outputs_of(rows), rules, policy)
    found = {(row["question_id"], row["sample"]): row["label"] for row in made.rows()}
    assert found.get(("q0", 3)) == label
    assert made.metrics["rm/left_out"] == pytest.approx(0 if label is not None else 1 / 16)


def test_rules_without_steps_make_labels_without_steps(store: Store) -> None:
    policy = tiny_checkpoint()
    rows = label_rows(policy)
    made = label_outputs(outputs_of(rows), rules_of(rows, step_rewards=None, step_ends=None), policy)
    assert {row["step_ends"] for row in made.rows()} == {row["step_labels"] for row in made.rows()} == {None}
    assert "rm/right_steps_share" not in made.metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"question_id": "elsewhere"},
            r"rewards do not match outputs: .* without a row, first \('q0', 1\)",
        ),
        ({"scorer": "a" * 64}, r"output \('q0', 1\) was rewarded by a model \(aaaaaaaaaaaa\); labels are the rules'"),
        ({"step_ends": [0], "step_rewards": [1.0, 0.0]}, r"output \('q0', 1\): expected one step reward for each"),
        ({"step_ends": [99], "step_rewards": [1.0]}, r"output \('q0', 1\) has \d tokens, its steps end at \[99\]"),
    ],
)
def test_rewards_that_are_no_labels_are_refused_by_row(store: Store, change: dict[str, Any], message: str) -> None:
    policy = tiny_checkpoint()
    rows = label_rows(policy)
    with pytest.raises(ValueError, match=message):
        label_outputs(outputs_of(rows), changed(rules_of(rows), _1=change), policy)
