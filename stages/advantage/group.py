"""Group-relative advantages: outcome supervision (DeepSeekMath, 4.1.2) and process supervision (4.1.3)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.advantage.config import GroupConfig
from stages.advantage.estimates import Estimate, kl_penalties
from stages.advantage.inputs import Outputs, Scored, read_k1
from stages.join import key_at
from stages.kernels.advantage import (
    GroupStatistics,
    centre,
    group_statistics,
    leave_one_out,
    normalise,
    process_advantages,
)
from stages.reward_metrics import RewardMetric

Floats = NDArray[np.float64]


def group_advantages(outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: GroupConfig) -> Estimate:
    """Compare each output, or each step, with all others of its question.

    Raises:
        ValueError: questions without samples 0 .. G-1; process supervision without step rewards; no `logprobs` where the KL is
            part of the reward.
    """
    outputs.require_groups("a group-relative advantage")
    if config.supervision == "process":
        estimate, degenerate_Q = _process(outputs, scored, config)
    else:
        estimate, degenerate_Q = _outcome(outputs, scored, logprobs, config)
    masked_N = estimate.masked_N
    if config.truncated == "mask":
        masked_N = masked_N | outputs.cut_N
    if config.degenerate == "mask":
        masked_N = masked_N | degenerate_Q[outputs.group_N]
    means = estimate.means | {RewardMetric.DEGENERATE_GROUPS: degenerate_Q}
    return Estimate(estimate.advantage_M, masked_N, means=means)


def _outcome(
    outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: GroupConfig
) -> tuple[Estimate, NDArray[np.bool_]]:
    """One value per output, the same at each of its tokens."""
    reward_N = scored.reward_N
    penalties = kl_penalties(outputs, read_k1(logprobs, outputs, config.kl_in_reward), config.kl_in_reward)
    for penalty_N in penalties.values():
        reward_N = reward_N - penalty_N
    statistics = group_statistics(reward_N, outputs.group_N, ddof=config.ddof)
    advantage_N = _compare(reward_N, outputs.group_N, statistics, config)
    means = penalties | {RewardMetric.STD_WITHIN_GROUP: statistics.std_Q}
    advantage_M = np.repeat(advantage_N, outputs.length_N)
    return Estimate(advantage_M, np.isnan(advantage_N), means=means), statistics.degenerate_Q


def _process(outputs: Outputs, scored: Scored, config: GroupConfig) -> tuple[Estimate, NDArray[np.bool_]]:
    """Step rewards normalised over all steps of all outputs of the question, then summed from each token on."""
    steps, ends = scored.step_rewards, scored.step_ends
    unscored = np.flatnonzero(steps.null & ~np.isnan(scored.reward_N))
    if len(unscored):
        key = key_at(outputs.table, unscored[0])
        raise ValueError(f"supervision process: {key} has a reward and no step rewards; score all outputs by steps")
    # An output without steps keeps a place (NaN takes no part), so that no question is without values.
    count_N = np.maximum(steps.lengths, 1)
    value_S = np.full(count_N.sum(), np.nan)
    value_S[np.repeat(steps.lengths > 0, count_N)] = steps.values
    group_S = np.repeat(outputs.group_N, count_N)
    statistics = group_statistics(value_S, group_S, ddof=config.ddof)
    compared = np.split(_compare(value_S, group_S, statistics, config), np.cumsum(count_N)[:-1])
    advantages = [
        process_advantages(step_K, end_K, length) if len(end_K) else np.zeros(length)
        for step_K, end_K, length in zip(compared, ends, outputs.length_N.tolist(), strict=True)
    ]
    means = {RewardMetric.STEPS_MEAN: steps.lengths[~steps.null], RewardMetric.STD_WITHIN_GROUP: statistics.std_Q}
    return Estimate(np.concatenate(advantages), steps.null, means=means), statistics.degenerate_Q


def _compare(value_N: Floats, group_N: NDArray[np.int64], statistics: GroupStatistics, config: GroupConfig) -> Floats:
    match config.baseline, config.scale:
        case "mean", "std":
            return normalise(value_N, group_N, statistics, eps=config.eps)
        case "mean", "none":
            return centre(value_N, group_N, statistics)
        case "leave_one_out", "none":
            return leave_one_out(value_N, group_N, statistics)
        case _:
            raise AssertionError("refused by the config")


def require_steps(rewards: pa.Table | None, config: GroupConfig) -> None:
    """Refuse process supervision of rewards none of which has steps."""
    if config.supervision == "process" and rewards is not None and rewards["step_rewards"].null_count == len(rewards):
        raise ValueError(
            "supervision process needs step rewards, and no row has any; give the reward a component of kind `steps` "
            "(or a process reward model), or set supervision to outcome"
        )
