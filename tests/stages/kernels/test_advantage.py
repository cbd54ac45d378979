"""Group statistics and outcome advantages: values computed by hand or by an independent formula."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.kernels.advantage import group_statistics, normalise, outcome_advantages

ONE_GROUP_OF_4 = [0, 0, 0, 0]


def test_the_published_worked_example_has_advantages_094_and_minus_094() -> None:
    rewards = [1, 0, 0, 1, 1, 0, 1, 0]
    group = [0] * 8
    found = group_statistics(rewards, group, ddof=1)
    assert found.mean_Q[0] == 0.5
    assert round(found.std_Q[0], 2) == 0.53
    advantages = outcome_advantages(rewards, group, ddof=1, eps=0.0)
    assert [round(a, 2) for a in advantages] == [0.94, -0.94, -0.94, 0.94, 0.94, -0.94, 0.94, -0.94]


def test_a_lone_winner_of_four_gets_1_5_with_ddof_1_and_root_3_with_ddof_0() -> None:
    assert outcome_advantages([1, 0, 0, 0], ONE_GROUP_OF_4, ddof=1, eps=0.0).tolist() == [1.5, -0.5, -0.5, -0.5]
    expected = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    assert outcome_advantages([1, 0, 0, 0], ONE_GROUP_OF_4, ddof=0, eps=0.0) == pytest.approx(expected, abs=1e-12)


def test_a_group_is_compared_with_itself_only_whatever_the_order_of_the_rows() -> None:
    # Groups 0: rewards 1, 3 (std sqrt 2); 1: rewards 10, 30 (std 10 sqrt 2): both give -+ 1/sqrt 2.
    advantages = outcome_advantages([1, 30, 3, 10], [0, 1, 0, 1], ddof=1, eps=0.0)
    assert advantages == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.5**0.5, -(0.5**0.5)])


def test_eps_is_added_to_the_standard_deviation() -> None:
    # mean 1, std 1 (ddof 0): 1 / (1 + 0.25) = 0.8
    assert outcome_advantages([0, 2], [0, 0], ddof=0, eps=0.25).tolist() == [-0.8, 0.8]


@pytest.mark.parametrize("reward", [0.7, 0.1, -5.3, 1e-30, 0.9 + 0.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 8, 16, 64])
def test_equal_rewards_give_exactly_zero_even_without_eps(reward: float, size: int) -> None:
    assert outcome_advantages([reward] * size, [0] * size, ddof=1, eps=0.0).tolist() == [0.0] * size


def test_a_masked_row_keeps_its_slot_and_takes_no_part_in_the_statistics() -> None:
    advantages = outcome_advantages([1, None, 0, 0, 0], [0] * 5, ddof=1, eps=0.0)
    assert advantages[[0, 2, 3, 4]].tolist() == [1.5, -0.5, -0.5, -0.5]
    assert math.isnan(advantages[1])


def test_a_group_with_one_row_left_is_degenerate_and_gets_zero() -> None:
    found = group_statistics([1.0, math.nan, math.nan], [0, 0, 0], ddof=1)
    assert (found.valid_Q.tolist(), found.degenerate_Q.tolist(), found.std_Q.tolist()) == ([1], [True], [0.0])
    assert outcome_advantages([1.0, math.nan, math.nan], [0, 0, 0], ddof=1, eps=0.0)[0] == 0.0


def test_a_group_without_any_reward_stays_masked_and_hurts_no_other() -> None:
    advantages = outcome_advantages([math.nan, math.nan, 0, 2], [0, 0, 1, 1], ddof=0, eps=0.0)
    assert np.isnan(advantages[:2]).all()
    assert advantages[2:].tolist() == [-1.0, 1.0]


def test_a_group_of_one_is_refused_and_the_reason_given() -> None:
    with pytest.raises(ValueError, match=r"group 1 has one value.*G >= 2"):
        outcome_advantages([1, 0, 1], [0, 0, 1], ddof=1, eps=0.0)


def test_an_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="value 1 is infinite"):
        outcome_advantages([1, math.inf], [0, 0], ddof=1, eps=0.0)


@pytest.mark.parametrize("ddof", [-1, 2])
def test_another_ddof_is_refused(ddof: int) -> None:
    with pytest.raises(ValueError, match="ddof must be 0"):
        group_statistics([1, 0], [0, 0], ddof=ddof)


def test_the_statistics_of_all_step_rewards_of_a_group_are_those_of_process_supervision() -> None:
    # Two outputs with 2 and 3 steps; statistics over all five (DeepSeekMath 4.1.3): mean 0.5, std 0.353553.
    rewards, group = [0.9, 0.1, 0.2, 0.8, 0.5], [0] * 5
    found = group_statistics(rewards, group, ddof=1)
    assert found.std_Q[0] == pytest.approx(0.353553, abs=1e-6)
    expected = [1.131371, -1.131371, -0.848528, 0.848528, 0.0]
    assert normalise(rewards, group, found, eps=0.0) == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_mean_and_deviation_agree_with_the_standard_library(rewards: list[float]) -> None:
    found = group_statistics(rewards, [0] * len(rewards), ddof=1)
    assert found.mean_Q[0] == pytest.approx(statistics.fmean(rewards), rel=1e-9, abs=1e-9)
    if not found.degenerate_Q[0]:
        assert found.std_Q[0] == pytest.approx(statistics.stdev(rewards), rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-100, 100))
def test_scale_and_shift_of_the_rewards_do_not_change_advantages(r: list[float], scale: float, shift: float) -> None:
    if max(r) - min(r) < 1e-3:
        return
    moved = outcome_advantages([scale * x + shift for x in r], [0] * len(r), ddof=1, eps=0.0)
    assert moved == pytest.approx(outcome_advantages(r, [0] * len(r), ddof=1, eps=0.0), abs=1e-5)
