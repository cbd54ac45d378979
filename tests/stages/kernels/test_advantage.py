"""Advantages without a value function: values computed by hand or by an independent formula."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.kernels.advantage import (
    centre,
    gae,
    group_statistics,
    leave_one_out,
    normalise,
    normalise_batch,
    process_advantages,
    token_rewards,
)

ONE_GROUP_OF_4 = [0, 0, 0, 0]


def outcome_advantages(rewards: Any, group: list[int], *, ddof: int, eps: float) -> Any:
    """Outcome supervision: (r_i - mean(r)) / std(r)."""
    return normalise(rewards, group, group_statistics(rewards, group, ddof=ddof), eps=eps)


def test_the_published_worked_example_has_advantages_094_and_minus_094() -> None:
    rewards = [1, 0, 0, 1, 1, 0, 1, 0]
    group = [0] * 8
    found = group_statistics(rewards, group, ddof=1)
    assert found.mean_Q[0] == 0.5
    assert round(found.std_Q[0], 2) == 0.53
    advantages = outcome_advantages(rewards, group, ddof=1, eps=0.0)
    assert [round(a, 2) for a in advantages] == [0.94, -0.94, -0.94, 0.94, 0.94, -0.94, 0.94, -0.94]


@pytest.mark.claim("n or n - 1", "4.1.2")
def test_a_lone_winner_of_four_gets_1_5_with_ddof_1_and_root_3_with_ddof_0() -> None:
    assert outcome_advantages([1, 0, 0, 0], ONE_GROUP_OF_4, ddof=1, eps=0.0).tolist() == [1.5, -0.5, -0.5, -0.5]
    expected = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    assert outcome_advantages([1, 0, 0, 0], ONE_GROUP_OF_4, ddof=0, eps=0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.claim("statistics of the batch as the group's", "4.1.2")
def test_a_group_is_compared_with_itself_only_in_any_order_of_rows() -> None:
    # Groups 0: rewards 1, 3 (std sqrt 2); 1: rewards 10, 30 (std 10 sqrt 2): both give -+ 1/sqrt 2.
    advantages = outcome_advantages([1, 30, 3, 10], [0, 1, 0, 1], ddof=1, eps=0.0)
    assert advantages == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.5**0.5, -(0.5**0.5)])


@pytest.mark.claim("an eps that blows up noise")
def test_eps_is_added_to_the_standard_deviation() -> None:
    # mean 1, std 1 (ddof 0): 1 / (1 + 0.25) = 0.8
    assert outcome_advantages([0, 2], [0, 0], ddof=0, eps=0.25).tolist() == [-0.8, 0.8]


@pytest.mark.claim("equal rewards with advantages of 60")
@pytest.mark.parametrize("reward", [0.7, 0.1, -5.3, 1e-30, 0.9 + 0.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 8, 16, 64])
def test_equal_rewards_give_exactly_zero_even_without_eps(reward: float, size: int) -> None:
    rewards, group = [reward] * size, [0] * size
    assert outcome_advantages(rewards, group, ddof=1, eps=0.0).tolist() == [0.0] * size
    for compare in (centre, leave_one_out):
        assert compare(rewards, group, group_statistics(rewards, group, ddof=1)).tolist() == [0.0] * size


@pytest.mark.claim("masked rows in mean and deviation")
def test_a_masked_row_keeps_its_slot_and_takes_no_part_in_the_statistics() -> None:
    advantages = outcome_advantages([1, None, 0, 0, 0], [0] * 5, ddof=1, eps=0.0)
    assert advantages[[0, 2, 3, 4]].tolist() == [1.5, -0.5, -0.5, -0.5]
    assert math.isnan(advantages[1])
    # One row left: degenerate. None left: the group stays masked, and no other group notices.
    rewards, group = [math.nan, math.nan, 0, 2, 1.0, math.nan], [0, 0, 1, 1, 2, 2]
    assert outcome_advantages(rewards, group, ddof=0, eps=0.0) == pytest.approx(
        [math.nan, math.nan, -1.0, 1.0, 0.0, math.nan], nan_ok=True
    )
    found = group_statistics(rewards, group, ddof=0)
    assert (found.valid_Q.tolist(), found.degenerate_Q.tolist()) == ([0, 2, 1], [True, False, True])


@pytest.mark.claim("G = 1")
@pytest.mark.parametrize(
    ("rewards", "group", "ddof", "named"),
    [
        ([1, 0, 1], [0, 0, 1], 1, "group 1"),
        ([1, math.inf], [0, 0], 1, "value 1"),
        ([1, 0], [0, 0], -1, "-1"),
        ([1, 0], [0, 0], 2, "2"),
    ],
)
def test_a_group_of_one_is_refused_and_the_reason_given(rewards: Any, group: Any, ddof: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        group_statistics(rewards, group, ddof=ddof)


# Two outputs, 5 tokens with step ends 1 and 4, 4 tokens with step ends 0, 2 and 3 (DeepSeekMath, 4.1.3).
STEPS = [0.9, 0.1, 0.2, 0.8, 0.5]


@pytest.mark.claim("steps normalised per output", "4.1.3 statistics")
def test_steps_are_normalised_over_all_steps_of_all_outputs_of_the_group() -> None:
    found = group_statistics(STEPS, [0] * 5, ddof=1)
    assert (found.mean_Q[0], found.std_Q[0]) == pytest.approx((0.5, 0.353553), abs=1e-6)
    assert group_statistics(STEPS, [0] * 5, ddof=0).std_Q[0] == pytest.approx(0.316228, abs=1e-6)
    expected = [1.131371, -1.131371, -0.848528, 0.848528, 0.0]
    assert normalise(STEPS, [0] * 5, found, eps=0.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.claim("the token that ends a step left out", "4.1.3 sums")
def test_a_token_has_the_sum_of_the_steps_that_end_there_or_later() -> None:
    step = normalise(STEPS, [0] * 5, group_statistics(STEPS, [0] * 5, ddof=1), eps=0.0)
    first, second = process_advantages(step[:2], [1, 4], 5), process_advantages(step[2:], [0, 2, 3], 4)
    assert first == pytest.approx([0, 0, -1.131371, -1.131371, -1.131371], abs=1e-6)
    assert second == pytest.approx([0, 0.848528, 0.848528, 0], abs=1e-6)


@pytest.mark.claim("the token that ends a step left out")
def test_tokens_behind_the_last_step_get_exactly_zero() -> None:
    assert process_advantages([0.1, 0.2, 0.7], [0, 2, 2], 5).tolist() == pytest.approx([1.0, 0.9, 0.9, 0.0, 0.0])
    assert process_advantages([0.1], [0], 3).tolist() == [0.1, 0.0, 0.0]
    with pytest.raises(ValueError, match="3"):
        process_advantages([1.0], [3], 3)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.integers(1, 9), st.sampled_from([0, 1]))
def test_one_step_per_output_is_outcome_supervision_exactly(rewards: list[float], tokens: int, ddof: int) -> None:
    outcome = outcome_advantages(rewards, [0] * len(rewards), ddof=ddof, eps=0.0)
    for advantage in outcome:
        assert process_advantages([advantage], [tokens - 1], tokens).tolist() == [advantage] * tokens


@pytest.mark.claim("RLOO")
def test_leaving_one_out_compares_each_reward_with_the_mean_of_the_others() -> None:
    statistics_ = group_statistics([1, 0, 0, 0], ONE_GROUP_OF_4, ddof=1)
    found = leave_one_out([1, 0, 0, 0], ONE_GROUP_OF_4, statistics_)  # baselines 0, 1/3, 1/3, 1/3
    assert found == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], abs=1e-15)
    assert centre([1, 0, 0, 0], ONE_GROUP_OF_4, statistics_).tolist() == [0.75, -0.25, -0.25, -0.25]


@given(st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=2, max_size=9))
def test_the_left_out_mean_is_that_of_the_other_valid_rewards(rewards: list[float]) -> None:
    found = leave_one_out(rewards, [0] * len(rewards), group_statistics(rewards, [0] * len(rewards), ddof=1))
    for index, reward in enumerate(rewards):
        others = [r for place, r in enumerate(rewards) if place != index and not math.isnan(r)]
        if math.isnan(reward):
            assert math.isnan(found[index])
        else:
            assert found[index] == pytest.approx(reward - statistics.fmean(others or [reward]), abs=1e-9)


@pytest.mark.claim("leave-one-out with a standard deviation")
def test_the_others_of_a_lone_winner_have_no_spread_to_divide_by() -> None:
    """Why leave-one-out with a standard deviation is refused: the winner's is 0, the others' .471405."""
    spreads = [statistics.pstdev([r for j, r in enumerate([1, 0, 0, 0]) if j != i]) for i in range(4)]
    assert spreads == pytest.approx([0, 0.471405, 0.471405, 0.471405], abs=1e-6)
    assert [(1, -1 / 3)[i > 0] / (spread + 1e-6) for i, spread in enumerate(spreads)] == pytest.approx(
        [1e6, -0.707105, -0.707105, -0.707105], rel=1e-6
    )


def test_rewards_whose_squares_underflow_are_normalised_like_any_other() -> None:
    assert outcome_advantages([1e-200, 0, 0, 0], ONE_GROUP_OF_4, ddof=1, eps=0.0) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5]
    )


def test_the_batch_is_normalised_as_a_whole_with_missing_values_left_out() -> None:
    assert normalise_batch([0, 2, math.nan, 0, 2]).tolist()[:2] == [-1, 1]
    assert math.isnan(normalise_batch([0, 2, math.nan])[2])
    assert normalise_batch([0.7] * 8).tolist() == [0.0] * 8
    assert normalise_batch([0.7]).tolist() == [0.0]
    assert normalise_batch([]).tolist() == []


def test_the_reward_is_at_the_last_token_the_penalty_at_every_token() -> None:
    found = token_rewards([1.0, 5.0, 2.0], [3, 0, 2], [0.1, 0.2, 0.3, -0.4, 0.5], beta=0.5)
    assert found == pytest.approx([-0.05, -0.1, 0.85, 0.2, 1.75])
    assert token_rewards([1.0, 2.0], [2, 1], None, beta=0.0).tolist() == [0, 1, 2]


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


@pytest.mark.parametrize(("eps", "share"), [(0.0, 0.5), (0.1, 0.136)])
def test_noise_of_a_reward_weighs_as_much_as_a_signal_unless_damped(eps: float, share: float) -> None:
    """Half the groups have no right output. Without eps they have half of sum A^2; with twice the noise their A is a third."""
    generator, groups, G, sigma = np.random.default_rng(0), 400, 16, 0.05
    group_N = np.repeat(np.arange(groups), G)
    right_N = (np.arange(groups * G) % 2) * (group_N % 2)  # half of the outputs of every second question
    score_N = right_N + sigma * generator.standard_normal(groups * G)
    found_N = normalise(score_N, group_N, group_statistics(score_N, group_N, ddof=1), eps=eps) ** 2
    # With eps (1/3)^2 compared with (0.52 / 0.62)^2: 0.111 / (0.111 + 0.703) = 0.136.
    assert found_N[group_N % 2 == 0].sum() / found_N.sum() == pytest.approx(share, abs=0.01)


def random_batch(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Four outputs of 7, 4, 1 and 6 tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array([7, 4, 1, 6])[:, None]
    return rng.normal(size=mask.shape) * mask, rng.normal(size=mask.shape) * mask, mask


@pytest.mark.claim("4.1.1 GAE")
def test_three_tokens_with_a_reward_at_the_end_by_hand() -> None:
    # gamma 0.5, lam 0.5; V = 1, 2, 4; r = 0, 0, 8.
    # delta = 0 + 0.5*2 - 1 = 0; 0 + 0.5*4 - 2 = 0; 8 - 4 = 4.  A_2 = 4; A_1 = 0 + 0.25*4 = 1; A_0 = 0 + 0.25*1 = 0.25.
    found = gae([[0, 0, 8]], [[1, 2, 4]], [[1, 1, 1]], gamma=0.5, lam=0.5)
    assert found.advantage_BT.tolist() == [[0.25, 1.0, 4.0]]
    assert found.return_BT.tolist() == [[1.25, 3.0, 8.0]]


def test_with_lambda_1_it_is_the_reward_to_go_minus_the_value() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=1.0, lam=1.0)
    to_go = reward[:, ::-1].cumsum(1)[:, ::-1] * mask
    np.testing.assert_allclose(found.advantage_BT, to_go - value, atol=1e-12)
    np.testing.assert_allclose(found.return_BT, to_go, atol=1e-12)


def test_with_lambda_0_it_is_the_one_step_error() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.0)
    # Values are 0 beyond the end of each output, so that shifting them by one is V_{t+1}.
    following = np.pad(value[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(found.advantage_BT, (reward + 0.9 * following - value) * mask, atol=1e-12)


@pytest.mark.claim("4.1.1 GAE")
def test_it_is_the_discounted_sum_of_the_errors_that_follow() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.8)
    delta = gae(reward, value, mask, gamma=0.9, lam=0.0).advantage_BT
    for row, length in enumerate(mask.sum(1)):
        for t in range(length):
            by_definition = sum((0.9 * 0.8) ** (later - t) * delta[row, later] for later in range(t, length))
            assert found.advantage_BT[row, t] == pytest.approx(by_definition, abs=1e-12)


@pytest.mark.claim("GAE that stops at a masked position")
def test_padding_changes_nothing_whatever_is_in_it() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.8)
    wide = [np.pad(array, ((0, 0), (0, 3))) for array in (reward, value, mask)]
    wide[0][~wide[2]], wide[1][~wide[2]] = np.nan, np.inf
    padded = gae(*wide, gamma=0.9, lam=0.8)
    assert np.array_equal(padded.advantage_BT[:, :7], found.advantage_BT)
    assert np.array_equal(padded.return_BT[:, :7], found.return_BT)
    assert not padded.advantage_BT[~wide[2]].any()
    assert not padded.return_BT[~wide[2]].any()


@pytest.mark.claim("GAE that stops at a masked position")
def test_a_masked_stretch_in_the_middle_is_skipped_as_if_it_were_not_there() -> None:
    # By hand, gamma = lam = 0.5, the middle position masked: V_{t+1} of the first token is that of the third, 4.
    # delta_0 = 0 + 0.5*4 - 1 = 1; delta_2 = 8 - 4 = 4; A_0 = 1 + 0.25*4 = 2.
    found = gae([[0, 100, 8]], [[1, 50, 4]], [[1, 0, 1]], gamma=0.5, lam=0.5)
    assert found.advantage_BT.tolist() == [[2.0, 0.0, 4.0]]
    assert found.return_BT.tolist() == [[3.0, 0.0, 8.0]]
    assert gae([[5.0, 5.0]], [[1.0, 1.0]], [[0, 0]], gamma=1.0, lam=1.0).advantage_BT.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("values", "gamma", "lam", "named"),
    [([[0.0]], 1.1, 0.5, "1.1"), ([[0.0]], 0.5, -0.1, "-0.1"), ([[0.0, 0.0]], 1.0, 1.0, r"\(1, 1\), \(1, 2\)")],
)
def test_a_discount_or_a_shape_that_does_not_fit_is_refused(values: Any, gamma: float, lam: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gae([[0.0]], values, [[1]], gamma=gamma, lam=lam)
