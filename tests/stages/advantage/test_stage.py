"""The advantage stage: joined by key, one value per token, values by hand; and what it refuses, by row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from pipeline.config import Config, ConfigError
from stages.advantage import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    TeacherConfig,
    estimate_advantages,
)
from stages.join import JoinError
from stages.tables import Rewards
from tests.stages.advantage.tables import (
    PROCESS,
    advantages,
    estimate,
    group,
    logprobs_of,
    outputs_of,
    rewards_of,
    row,
    values_of,
)

pytestmark = pytest.mark.usefixtures("store")

LONE_WINNER = [row("a", 0, 1.0, 3), row("a", 1, 0.0, 1), row("a", 2, 0.0, 2), row("a", 3, 0.0, 0)]


class _Holder(Config):
    advantage: AdvantageConfig = GroupConfig()


@pytest.mark.claim("joined by position", "line 9")
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_output_token_has_the_advantage_of_its_output(shuffle: bool) -> None:
    scored = random.Random(0).sample(LONE_WINNER, k=4) if shuffle else LONE_WINNER
    made = estimate_advantages(rewards_of(scored), outputs_of(LONE_WINNER), GroupConfig())
    assert [found["advantage"] for found in made.rows()] == [[1.5] * 3, [-0.5], [-0.5] * 2, []]
    assert [(found["question_id"], found["sample"]) for found in made.rows()] == [("a", i) for i in range(4)]
    assert {(found["returns"], found["pair"]) for found in made.rows()} == {(None, None)}


@pytest.mark.claim("on-policy distillation")
def test_a_teacher_gives_each_token_its_own_log_ratio_and_needs_no_rewards() -> None:
    rows = [row("a", 0, 1.0, 2), row("b", 0, None, 1)]
    outputs, k1 = outputs_of(rows), logprobs_of(rows, [0.25, -0.5], [1.0])
    made = estimate_advantages(None, outputs, TeacherConfig(), logprobs=k1)
    assert [found["advantage"] for found in made.rows()] == [[-0.25, 0.5], [-1.0]]
    assert set(made.metrics) == {"reward/frac_masked"}
    with pytest.raises(ValueError, match="kind teacher needs the log-probabilities"):
        estimate_advantages(None, outputs, TeacherConfig())


@pytest.mark.parametrize("eps", [0.0, 0.5, 2.0])
def test_eps_is_added_to_the_deviation_of_outputs_and_of_steps(eps: float) -> None:
    # Rewards 1 and -1, steps alike: the mean is 0 and the deviation 1 with ddof 0.
    rows = [row("a", 0, 1.0, 1, steps=[(1.0, 0)]), row("a", 1, -1.0, 1, steps=[(-1.0, 0)])]
    for supervision in ("outcome", "process"):
        found = advantages(rows, GroupConfig(ddof=0, eps=eps, supervision=supervision))
        assert [value for (value,) in found] == pytest.approx([1 / (1 + eps), -1 / (1 + eps)])


@pytest.mark.claim("groups formed by equal prompts")
def test_groups_are_questions_even_when_their_rows_alternate() -> None:
    rows = [row("a", 0, 0.0, 1), row("b", 0, 1.0, 1), row("a", 1, 2.0, 1), row("b", 1, 1.0, 1)]
    assert advantages(rows, GroupConfig(ddof=0)) == [[-1.0], [0.0], [1.0], [0.0]]


@pytest.mark.claim("rows filtered before groups are formed")
def test_a_row_without_reward_is_null_and_does_not_move_the_others() -> None:
    made = estimate([*LONE_WINNER, row("a", 4, None, 2)])
    assert [found["advantage"] for found in made.rows()] == [[1.5] * 3, [-0.5], [-0.5] * 2, [], None]
    assert made.metrics["reward/frac_masked"] == 0.2


@pytest.mark.claim("truncated outputs treated by accident")
def test_a_truncated_row_may_be_masked_and_still_counts_in_the_statistics() -> None:
    rows = [LONE_WINNER[0], LONE_WINNER[1] | {"cut": True}, *LONE_WINNER[2:]]
    assert advantages(rows, GroupConfig(truncated="mask")) == [[1.5] * 3, None, [-0.5] * 2, []]


@pytest.mark.claim("equal groups that lose their KL term")
def test_a_group_of_equal_rewards_is_kept_at_zero_or_masked() -> None:
    rows = [*group("a", 0.7, 0.7), *group("b", 0.0, 2.0)]
    half = pytest.approx([math.sqrt(0.5)] * 2)
    assert advantages(rows)[:2] == [[0.0, 0.0], [0.0, 0.0]]
    assert advantages(rows, GroupConfig(degenerate="mask"))[:3] == [None, None, pytest.approx([-math.sqrt(0.5)] * 2)]
    assert advantages(rows, GroupConfig(degenerate="mask"))[3] == half


@pytest.mark.claim("Dr. GRPO")
def test_leave_one_out_and_no_scale_are_rloo_and_dr_grpo() -> None:
    rows = group("a", 1.0, 0.0, 0.0, 0.0, tokens=1)
    rloo = advantages(rows, GroupConfig(baseline="leave_one_out", scale="none"))
    assert [value for (value,) in rloo] == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert advantages(rows, GroupConfig(scale="none")) == [[0.75], [-0.25], [-0.25], [-0.25]]


def test_a_penalty_in_the_reward_is_summed_before_groups_are_compared() -> None:
    rows = [row("a", 0, 1.0, 2), row("a", 1, 0.0, 1)]
    logprobs = logprobs_of(rows, [0.5, 1.5], [-1.0])  # r - 0.25 * sum k1 = 1 - 0.5, 0 + 0.25; mean .375
    made = estimate(rows, GroupConfig(scale="none", kl_in_reward=0.25), logprobs=logprobs)
    assert [found["advantage"] for found in made.rows()] == [[0.125, 0.125], [-0.125]]
    assert made.metrics["reward/kl_penalty"] == pytest.approx((0.5 - 0.25) / 2)


@pytest.mark.claim("4.1.3 sums")
def test_process_supervision_sums_the_steps_that_are_still_to_come() -> None:
    made = estimate(PROCESS, GroupConfig(supervision="process"))
    first, second = (found["advantage"] for found in made.rows())
    assert first == pytest.approx([0, 0, -1.131371, -1.131371, -1.131371], abs=1e-6)
    assert second == pytest.approx([0, 0.848528, 0.848528, 0], abs=1e-6)
    assert made.metrics["reward/steps_mean"] == 2.5
    assert made.metrics["reward/std_within_group"] == pytest.approx(0.353553, abs=1e-6)


@pytest.mark.claim("process unlike outcome at one step")
@pytest.mark.parametrize("config", [GroupConfig(), GroupConfig(ddof=0), GroupConfig(scale="none")])
def test_one_step_per_output_is_outcome_supervision_bit_for_bit(config: GroupConfig) -> None:
    draw = random.Random(1)
    rewards = {(question, sample): draw.gauss(0, 1) for question in "abc" for sample in range(5)}
    rows = [row(q, s, r, 3 + s, steps=[(r, 2 + s)]) for (q, s), r in rewards.items()]
    assert advantages(rows, config.override({"supervision": "process"})) == advantages(rows, config)


@pytest.mark.claim("statistics of the batch as the group's")
def test_steps_of_one_question_do_not_move_those_of_another() -> None:
    other = [row("b", 0, 1.0, 2, steps=[(9.0, 1)]), row("b", 1, 1.0, 2, steps=[(-9.0, 0), (3.0, 1)])]
    config = GroupConfig(supervision="process")
    assert advantages([*PROCESS, *other], config)[:2] == advantages(PROCESS, config)


def test_an_output_without_reward_and_steps_is_masked() -> None:
    rows = [*PROCESS, row("a", 2, None, 3)]
    config = GroupConfig(supervision="process")
    assert advantages(rows, config) == [*advantages(PROCESS, config), None]


@pytest.mark.claim("equal rewards with advantages of 60")
def test_equal_steps_are_degenerate_and_get_exactly_zero() -> None:
    rows = [row("a", 0, 1.0, 2, steps=[(0.1, 0), (0.1, 1)]), row("a", 1, 1.0, 1, steps=[(0.1, 0)])]
    made = estimate(rows, GroupConfig(supervision="process"))
    assert [found["advantage"] for found in made.rows()] == [[0.0, 0.0], [0.0]]
    assert made.metrics["reward/frac_degenerate_groups"] == 1.0


def test_supervised_fine_tuning_has_one_everywhere_and_needs_no_rewards() -> None:
    made = estimate_advantages(None, outputs_of(LONE_WINNER), OneConfig())
    assert [found["advantage"] for found in made.rows()] == [[1.0] * 3, [1.0], [1.0] * 2, []]


@pytest.mark.claim("RFT averaged over right outputs only")
def test_rejection_sampling_keeps_wrong_outputs_at_zero() -> None:
    rows = [row("a", 0, 1.0), row("a", 1, 0.0), row("b", 0, 0.0, status="truncated"), row("b", 1, None)]
    assert advantages(rows, CorrectConfig()) == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], None]


def test_the_whole_batch_is_normalised_over_its_tokens() -> None:
    rows = [
        row("a", 0, 1.0, 3),
        row("b", 0, 0.0, 1),
        row("b", 1, None, 2),
    ]  # tokens 1, 1, 1, 0: mean 3/4, std sqrt(3)/4
    high, low = 1 / math.sqrt(3), -math.sqrt(3)
    found = advantages(rows, BatchConfig(kl_in_reward=0))
    assert found == [pytest.approx([high] * 3), pytest.approx([low]), None]


@pytest.mark.claim("REINFORCE++")
def test_the_batch_penalty_accumulates_from_the_end_of_each_output() -> None:
    rows = [row("a", 0, 1.0, 2), row("a", 1, 0.0, 1)]
    made = estimate(rows, BatchConfig(kl_in_reward=0.5), logprobs=logprobs_of(rows, [1.0, 2.0], [-2.0]))
    # to go: 1 - .5 - 1, 1 - 1, 0 + 1 = -.5, 0, 1; mean 1/6, population std sqrt(7/18)
    expected = [(x - 1 / 6) / math.sqrt(7 / 18) for x in (-0.5, 0.0, 1.0)]
    assert [x for found in made.rows() for x in found["advantage"]] == pytest.approx(expected)
    assert made.metrics["reward/kl_penalty"] == pytest.approx((1.5 - 1.0) / 2)


def test_the_groups_mean_is_subtracted_before_the_batch_is_normalised() -> None:
    rows = [*group("a", 10.0, 12.0, tokens=1), *group("b", 1.0, 0.0, tokens=1)]  # centred: -1, 1, .5, -.5
    scale = math.sqrt((1 + 1 + 0.25 + 0.25) / 4)
    found = advantages(rows, BatchConfig(kl_in_reward=0, baseline="group_mean"))
    assert [value for (value,) in found] == pytest.approx([-1 / scale, 1 / scale, 0.5 / scale, -0.5 / scale])


def test_generalised_advantages_weigh_the_errors_of_the_values_that_follow() -> None:
    rows = [row("a", 0, 1.0, 2), row("b", 0, 0.0, 1)]
    config = GAEConfig(gamma=0.5, lam=0.5, kl_in_reward=0)
    made = estimate(rows, config, values=values_of(rows, [0.25, 0.5], [0.125])).rows()
    # delta_1 = 1 - .5; delta_0 = 0 + .5 * .5 - .25 = 0; A_0 = 0 + .25 * .5
    assert made[0]["advantage"] == [0.125, 0.5]
    assert made[0]["returns"] == [0.375, 1.0]
    assert (made[1]["advantage"], made[1]["returns"]) == ([-0.125], [0.0])


@pytest.mark.claim("Eq. 2")
def test_the_penalty_of_ppo_is_in_the_reward_of_every_token() -> None:
    rows = [row("a", 0, 1.0, 2), row("a", 1, None, 3)]
    logprobs = logprobs_of(rows, [1.0, -2.0], [0.0] * 3)
    config = GAEConfig(gamma=1, lam=1, kl_in_reward=0.25)
    made = estimate(rows, config, values=values_of(rows, [0.0, 0.0], [9.0] * 3), logprobs=logprobs).rows()
    assert made[0]["returns"] == made[0]["advantage"] == [1.25, 1.5]  # token rewards -.25, 1 + .5
    assert (made[1]["advantage"], made[1]["returns"]) == (None, None)


def test_whitening_normalises_advantages_and_leaves_the_returns() -> None:
    rows = [row("a", 0, 1.0, 1), row("b", 0, 0.0, 1), row("c", 0, None, 1)]
    config = GAEConfig(kl_in_reward=0, whiten="batch")
    made = estimate(rows, config, values=values_of(rows, [0.5], [0.25], [7.0])).rows()
    assert [found["advantage"] for found in made] == [[1.0], [-1.0], None]
    assert [found["returns"] for found in made] == [[1.0], [0.0], None]


def test_the_i_th_right_output_is_paired_with_the_i_th_wrong_one() -> None:
    rows = [
        *group("a", 0.0, 1.0, 1.0, 0.0, 0.0),
        *group("b", 1.0, 1.0, 1.0, 1.0, 1.0),
        *group("c", None, 0.0, 1.0, 1.0, 1.0),
    ]
    made = estimate(rows, PairsConfig())
    assert [found["pair"] for found in made.rows()] == [0, 0, 1, 1, None, *[None] * 5, None, 2, 2, None, None]
    assert [found["advantage"] for found in made.rows()][:5] == [[-1.0] * 2, [1.0] * 2, [1.0] * 2, [-1.0] * 2, None]
    assert made.metrics["reward/pairs"] == 3
    assert made.metrics["reward/frac_masked"] == pytest.approx(9 / 15)


@pytest.mark.claim("training for hours on nothing")
def test_the_metrics_describe_the_groups() -> None:
    metrics = estimate(
        [*group("a", 1.0, 1.0), *group("b", 0.0, 0.0), *group("c", 1.0, 0.0), *group("d", 0.5, 0.5)]
    ).metrics
    assert metrics["reward/frac_degenerate_groups"] == 0.75
    assert metrics["reward/frac_all_correct"] == 0.25
    assert metrics["reward/frac_all_wrong"] == 0.5
    assert metrics["reward/std_within_group"] == pytest.approx(0.5**0.5 / 4)


def test_the_kind_alone_selects_what_an_advantage_is_made_of() -> None:
    kinds = {"one": OneConfig, "correct": CorrectConfig, "group": GroupConfig, "batch": BatchConfig, "gae": GAEConfig}
    for kind, expected in (kinds | {"pairs": PairsConfig}).items():
        assert type(_Holder().override({"advantage.kind": kind}).advantage) is expected


@pytest.mark.claim("hidden shaping")
def test_the_defaults_of_a_group_are_the_papers_outcome_supervision() -> None:
    default = GroupConfig()
    assert (default.supervision, default.baseline, default.scale, default.kl_in_reward) == ("outcome", "mean", "std", 0)
    assert (default.eps, default.degenerate, default.truncated) == (0, "keep", "keep")


EVERY_KIND = [OneConfig(), CorrectConfig(), GroupConfig(), BatchConfig(kl_in_reward=0), PairsConfig()]
GROUPED = [GroupConfig(), BatchConfig(kl_in_reward=0, baseline="group_mean"), PairsConfig()]


@pytest.mark.claim("G = 1")
@pytest.mark.parametrize("config", GROUPED)
def test_a_single_output_per_question_is_refused_by_name(config: Any) -> None:
    with pytest.raises(ValueError, match=r"'solo' has one output.*needs G >= 2"):
        estimate([*group("a", 1.0, 0.0), row("solo", 0, 1.0)], config)


@pytest.mark.claim("rows filtered before groups are formed")
@pytest.mark.parametrize("config", GROUPED)
def test_a_group_with_a_missing_sample_is_refused_by_name(config: Any) -> None:
    with pytest.raises(ValueError, match=r"'b': expected samples 0 \.\. 2, \[1\] missing"):
        estimate([*group("a", 1.0, 0.0), row("b", 0, 1.0), row("b", 2, 1.0)], config)
    with pytest.raises(ValueError, match=r"'b' has 2 outputs, question 'a' has 3"):
        estimate([*group("a", 1.0, 0.0, 0.0), *group("b", 1.0, 0.0)], config)


@pytest.mark.parametrize("config", [OneConfig(), CorrectConfig(), BatchConfig(kl_in_reward=0)])
def test_kinds_that_compare_nothing_take_any_number_of_outputs(config: Any) -> None:
    assert None not in advantages([row("a", 0, 1.0), row("b", 1, 0.0), row("b", 4, 0.0)], config)


@pytest.mark.claim("two rewards for one output, or none")
def test_rewards_of_other_rows_are_refused_with_an_example() -> None:
    two, three = group("a", 1.0, 0.0), group("a", 1.0, 0.0, 0.0)
    with pytest.raises(JoinError) as refused:
        estimate_advantages(rewards_of(two), outputs_of(three), GroupConfig())
    assert (refused.value.table, refused.value.missing, refused.value.extra) == ("rewards", ("a", 2), None)
    with pytest.raises(JoinError) as refused:
        estimate_advantages(rewards_of(three), outputs_of(two), GroupConfig())
    assert (refused.value.missing, refused.value.extra) == (None, ("a", 2))


@pytest.mark.parametrize("table", ["rewards", "outputs"])
def test_a_repeated_row_is_refused(table: str) -> None:
    once, twice = group("a", 1.0, 0.0), [row("a", 0, 1.0), row("a", 0, 0.0)]
    scored, sampled = (twice, once) if table == "rewards" else (once, twice)
    with pytest.raises(JoinError) as refused:
        estimate_advantages(rewards_of(scored), outputs_of(sampled), GroupConfig())
    assert (refused.value.table, refused.value.repeated) == (table, ("a", 0))


@pytest.mark.parametrize("config", EVERY_KIND)
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused_by_name_under_every_kind(config: Any, reward: float) -> None:
    with pytest.raises(ValueError, match=rf"reward of \('a', 1\) is {reward}; expected a finite number, or null"):
        estimate(group("a", 1.0, reward), config)


@pytest.mark.claim("two reward models in one group")
def test_rewards_of_two_models_are_never_compared_in_one_group() -> None:
    rows = [row("a", 0, 1.0, scorer="m1"), row("a", 1, 0.0, scorer="m2")]
    with pytest.raises(ValueError, match=r"'a': \('a', 0\) was scored by m1, \('a', 1\) by m2"):
        estimate(rows)
    with pytest.raises(ValueError, match="by rules"):
        estimate([rows[0], row("a", 1, 0.0)])
    apart = [*group("a", 1.0, 0.0), *(each | {"scorer": "m2"} for each in group("b", 1.0, 0.0))]
    assert None not in advantages(apart)


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ({"step_rewards": [1.0, 1.0], "step_ends": [1]}, "found 2 step_rewards and 1 step_ends"),
        ({"step_rewards": [1.0]}, "step_rewards"),
        ({"step_rewards": [1.0], "step_ends": [2]}, r"step 0 ends at token 2; the output has the tokens 0 \.\. 1"),
        ({"step_rewards": [1.0], "step_ends": [-1]}, "step 0 ends at token -1"),
        ({"step_rewards": [1.0, 1.0], "step_ends": [1, 0]}, "step 1 ends at token 0, before the previous step"),
        ({"step_rewards": [1.0, math.nan], "step_ends": [0, 1]}, "reward of step 1 is nan"),
        ({"step_rewards": [], "step_ends": []}, "an output in which no step is found counts as one step"),
    ],
)
def test_steps_that_do_not_fit_their_output_are_refused_by_name(steps: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"steps of \('a', 1\).*{fault}"):
        estimate([row("a", 0, 1.0), row("a", 1, 1.0, **steps)])


def test_process_supervision_without_step_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match="no row has any; give the reward a component of kind `steps`"):
        estimate(group("a", 1.0, 0.0), GroupConfig(supervision="process"))
    with pytest.raises(ValueError, match=r"\('a', 2\) has a reward and no step rewards"):
        estimate([*PROCESS, row("a", 2, 0.0)], GroupConfig(supervision="process"))


def test_tables_that_a_kind_needs_are_asked_for_by_name() -> None:
    rows = group("a", 1.0, 0.0)
    with pytest.raises(ValueError, match="kind group is made from rewards; pass `rewards`"):
        estimate_advantages(None, outputs_of(rows), GroupConfig())
    with pytest.raises(ValueError, match="pass `values`"):
        estimate(rows, GAEConfig(kl_in_reward=0))
    for config in (GroupConfig(kl_in_reward=0.1), BatchConfig(), GAEConfig()):
        with pytest.raises(ValueError, match="pass `logprobs`"):
            estimate(rows, config, values=values_of(rows, [0.0] * 2, [0.0] * 2))


def test_values_and_logprobs_that_do_not_fit_are_refused_by_name() -> None:
    rows, config = group("a", 1.0, 0.0), GAEConfig(kl_in_reward=0)
    with pytest.raises(ValueError, match=r"\('a', 1\): values .* nan at token 1"):
        estimate(rows, config, values=values_of(rows, [0.0, 0.0], [0.0, math.nan]))
    with pytest.raises(ValueError, match=r"\('a', 0\): expected 2 values.* found 1"):
        estimate(rows, config, values=values_of(rows, [0.0], [0.0, 0.0]))
    with pytest.raises(JoinError) as refused:
        estimate(rows, config, values=values_of(rows[:1], [0.0, 0.0]))
    assert (refused.value.table, refused.value.missing) == ("values", ("a", 1))
    with pytest.raises(ValueError, match=r"\('a', 0\): .* under the policy .* -inf at token 0"):
        estimate(rows, GroupConfig(kl_in_reward=0.1), logprobs=logprobs_of(rows, [-math.inf, 0.0], [0.0, 0.0]))


def test_values_and_logprobs_that_are_not_needed_change_nothing() -> None:
    rows = group("a", 1.0, 0.0)
    unused = {"values": values_of(rows, [5.0], [5.0]), "logprobs": logprobs_of(rows, [1.0] * 2, [1.0] * 2)}
    assert advantages(rows, GroupConfig(), **unused) == advantages(rows, GroupConfig())


def test_an_exploration_without_outputs_is_refused() -> None:
    empty = Rewards.write({name: [] for name in Rewards.schema.names})
    with pytest.raises(ValueError, match="there are no outputs"):
        estimate_advantages(empty, outputs_of([]), GroupConfig())


@pytest.mark.claim("leave-one-out with a standard deviation")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"baseline": "leave_one_out"}, "others of a lone winner are all equal"),
        (
            {"supervision": "process", "baseline": "leave_one_out", "scale": "none"},
            "process with baseline leave_one_out",
        ),
        ({"supervision": "process", "kl_in_reward": 0.1}, "process with kl_in_reward"),
        ({"degenerate": "mask", "kl_in_reward": 0.1}, "no group has equal rewards"),
        ({"scale": "none", "eps": 1e-6}, "set eps to 0"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        GroupConfig.parse(settings)
