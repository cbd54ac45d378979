"""A reward model's score with other components: by hand, as a whole, by steps, and where an output was cut."""

from __future__ import annotations

from typing import Any

import pytest

from stages.advantage import GroupConfig, estimate_advantages
from stages.join import JoinError
from stages.reward import (
    AccuracyConfig,
    FormatConfig,
    LanguageConfig,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
    combine_rewards,
    labels_only,
    score,
)
from stages.reward.composition import Part, compose_steps
from stages.tables import Questions, Rewards
from tests.stages.reward.test_components import rollouts
from tests.stages.rows import question_table, reward_row

pytestmark = pytest.mark.usefixtures("store")

GOOD, FORMLESS, CUT = "12\n#### 9", "12\nno", "12\n#### 9"
OUTPUTS = (GOOD, FORMLESS, CUT)
"""Of 10, 6 and 9 tokens; the steps of the first end at tokens 2 and 9."""
STEP_SCORES = ([0.5, 1.5], [-0.5, -1.0], [3.0, 1.0])
SCORES = (2.0, -1.0, 3.0)
OTHERS = (FormatConfig(weight=0.25), OverlongConfig(weight=1.0, max_tokens=12, buffer_tokens=4))
"""Format: 1, 0 and 1. Overlong: (8 - 10) / 4 = -0.5, 0 and (8 - 9) / 4 = -0.25."""


def config(truncated: str, *components: Any) -> RewardConfig:
    return RewardConfig(components=(AccuracyConfig(verifier="exact"), *components), truncated=truncated)


def questions() -> Questions:
    return question_table("9", question="9?")


def scores(*, steps: bool = True) -> Rewards:
    """As `score_outputs` makes them."""
    ends = [[2, 9], [2, 5], [2, 8]]
    said = [("ok", "9"), ("unparseable", None), ("truncated", None)]
    return Rewards.write(
        [
            reward_row("q", sample, SCORES[sample], status=status, extracted=extracted, scorer="the model")
            | {"components": [("model", SCORES[sample]), ("rule", float(sample == 0))]}
            | ({"step_rewards": STEP_SCORES[sample], "step_ends": ends[sample]} if steps else {})
            for sample, (status, extracted) in enumerate(said)
        ]
    )


def combined(reward: RewardConfig, *, weight: float = 2.0, bounded: bool = False, steps: bool = True) -> Rewards:
    outputs = rollouts(*OUTPUTS, cut=(2,))
    return combine_rewards(scores(steps=steps), outputs, questions(), reward, weight=weight, bounded=bounded)


@pytest.mark.claim("components ignored with a reward model")
@pytest.mark.parametrize(
    ("truncated", "bounded", "last", "model", "last_steps"),
    [
        ("as_is", False, 2 * 3.0 + 0.25 - 0.25, 3.0, [6.0, 2.0]),
        ("as_unparseable", False, 2 * -1.0 - 0.25, -1.0, [6.0, 1.75]),  # the lowest of the question's scores
        ("as_unparseable", True, 2 * 0.0 - 0.25, 0.0, [6.0, 1.75]),
        ("no_reward", False, None, None, None),
    ],
)
def test_components_join_the_score_by_their_weights_and_truncation_holds_for_it(
    truncated: str, bounded: bool, last: float | None, model: float | None, last_steps: list[float] | None
) -> None:
    rows = combined(config(truncated, *OTHERS), bounded=bounded).rows()
    assert [row["reward"] for row in rows] == [2 * 2.0 + 0.25 - 0.5, 2 * -1.0, last]
    assert [row["step_rewards"] for row in rows] == [[1.0, 3.0 + 0.25 - 0.5], [-1.0, -2.0], last_steps]
    assert dict(rows[0]["components"]) == {"model": 2.0, "rule": 1.0, "format": 1.0, "overlong": -0.5}
    assert dict(rows[2]["components"])["model"] == model
    assert [row["status"] for row in rows] == ["ok", "unparseable", "truncated"]
    assert {row["scorer"] for row in rows} == {"the model"}


def test_each_component_has_its_metric_and_the_mean_is_of_what_counts() -> None:
    metrics = combined(config("as_unparseable", *OTHERS)).metrics
    assert metrics["reward/mean"] == pytest.approx((3.75 - 2.0 - 2.25) / 3)
    assert metrics["reward/model"] == pytest.approx((2.0 - 1.0 - 1.0) / 3)
    assert (metrics["reward/format"], metrics["reward/overlong"]) == (pytest.approx(1 / 3), pytest.approx(-0.25))
    assert metrics["reward/status_truncated"] == pytest.approx(1 / 3)


def test_a_model_by_itself_gives_the_very_table_of_its_scores() -> None:
    assert combined(config("as_is"), weight=1.0).digest == scores().digest


def test_no_reward_takes_the_steps_of_a_cut_output_out() -> None:
    rows = combined(config("no_reward")).rows()
    assert [row["reward"] for row in rows] == [4.0, -2.0, None]
    assert [row["step_rewards"] for row in rows] == [[1.0, 3.0], [-1.0, -2.0], None]
    assert rows[2]["step_ends"] is None


def test_the_answers_own_component_is_not_paid_twice() -> None:
    parts = (*OTHERS, AccuracyConfig(name="boxed", conventions=("boxed",), verifier="exact", weight=0.5))
    row = combined(config("as_is", *parts)).rows()[0]
    assert dict(row["components"]).keys() == {"model", "rule", "format", "overlong", "boxed"}
    assert row["reward"] == 3.75, "the first accuracy is what the model has learned; the second found no box"


def test_an_outcome_model_s_rewards_have_no_steps() -> None:
    assert {row["step_rewards"] for row in combined(config("as_is", *OTHERS), steps=False).rows()} == {None}


def test_process_supervision_pays_the_whole_output_s_part_at_its_last_step() -> None:
    made = combined(config("as_unparseable", *OTHERS))
    process = GroupConfig(supervision="process", scale="none")
    found = estimate_advantages(made, rollouts(*OUTPUTS, cut=(2,)), process)
    first = found.rows()[0]["advantage"]
    mean = (1.0 + 2.75 - 1.0 - 2.0 + 6.0 + 1.75) / 6
    assert first == pytest.approx([1.0 - mean + 2.75 - mean] * 3 + [2.75 - mean] * 7)


def test_an_output_without_a_score_is_named() -> None:
    with pytest.raises(JoinError) as refused:
        combine_rewards(scores(), rollouts(*OUTPUTS, GOOD), questions(), config("as_is"), weight=1.0, bounded=False)
    assert (refused.value.table, refused.value.missing) == ("scores", ("q", 3))


@pytest.mark.parametrize(
    ("steps", "weight", "others", "expected"),
    [
        ([1.0, 0.0], 1.0, [], [1.0, 0.0]),
        ([0.5, 1.5], 2.0, [Part(1.0, 0.25, "no_reward")], [1.0, 3.25]),
        ([0.5, 1.5], 1.0, [Part(-1.0, 0.5, "zero"), Part(1.0, 0.25, "zero")], [0.5, 1.25]),
        ([0.5, 1.5], 1.0, [Part(None, 0.25, "no_reward")], None),
        ([0.5, 1.5], 1.0, [Part(None, 0.25, "zero")], [0.5, 1.5]),
        # 1 + 0.25 + 0.75 shared by what is left, 1 + 0.75.
        ([0.5, 1.0], 1.0, [Part(None, 0.25, "rescale"), Part(1.0, 0.75, "zero")], [0.5 * 2 / 1.75, 1.75 * 2 / 1.75]),
        ([], 1.0, [Part(1.0, 0.25, "no_reward")], []),
    ],
)
def test_rewards_of_steps_by_hand(
    steps: list[float], weight: float, others: list[Part], expected: list[float] | None
) -> None:
    found = compose_steps(steps, weight, others)
    assert found == (None if expected is None else pytest.approx(expected))


def test_rules_too_pay_form_at_the_last_step_and_the_answer_nowhere() -> None:
    rules = config("as_is", StepsConfig(), FormatConfig(weight=0.25))
    asked = question_table("9", question="Compute 7+5-3.")
    made = score(rollouts("7+5=12\n12-3=9\n#### 9", "7+5=2\n2-3=9\nA: 9"), asked, rules)
    assert [found["step_rewards"] for found in made.rows()] == [[1.0, 1.0, 1.25], [0.0, 0.0, 0.0]]
    assert made.metrics["reward/steps"] == pytest.approx(3 / 6), "labels, without what is paid next to them"


def test_labels_come_from_the_answer_and_the_steps_alone() -> None:
    reward = config("as_is", FormatConfig(), StepsConfig(), LanguageConfig(), *OTHERS[1:])
    assert [component.kind for component in labels_only(reward).components] == ["accuracy", "steps"]
    assert labels_only(reward).truncated == "as_is"
    plain = config("as_is", StepsConfig())
    assert labels_only(plain) == plain
    formal = RewardConfig(components=(FormatConfig(), LanguageConfig()))
    assert [component.kind for component in labels_only(formal).components] == ["format"]
