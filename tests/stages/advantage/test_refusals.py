"""What the advantage stage refuses before it estimates anything, and how it names the rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.config import ConfigError
from stages.advantage import (
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
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
