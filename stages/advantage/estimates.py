"""Advantages of each kind: of one, of right outputs, of the group, of the batch, of a critic, and of preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.advantage.config import BatchConfig, GAEConfig, GroupConfig
from stages.advantage.inputs import Outputs, Scored, read_k1, read_ratio, read_values
from stages.join import key_at
from stages.kernels.advantage import (
    GroupStatistics,
    centre,
    gae,
    group_statistics,
    leave_one_out,
    normalise,
    normalise_batch,
    process_advantages,
    to_go,
    token_rewards,
)
from stages.reward_metrics import RewardMetric

_CELLS: Final = 2**21
"""Places of a block of padded outputs: one long output among short ones must not pad all of them."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Hold the advantages of N outputs with M tokens in all."""

    advantage_M: Floats
    """A-hat of every token, output after output."""
    masked_N: NDArray[np.bool_]
    """Outputs that take no part in the loss, whatever `advantage_M` has at their tokens."""
    return_M: Floats | None = None
    """What the critic learns to predict before every token."""
    pair_N: NDArray[np.int64] | None = None
    """The preference that an output belongs to, -1 where it belongs to none."""
    means: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Figures whose means are metrics, of questions or of outputs."""


def one_everywhere(outputs: Outputs) -> Estimate:
    """Return A = 1 at every token (SFT)."""
    return Estimate(np.ones(outputs.length_N.sum()), np.zeros(len(outputs.length_N), dtype=bool))


def nearer_to_teacher(outputs: Outputs, logprobs: pa.Table | None) -> Estimate:
    """Return A_t = log pi_teacher - log pi_theta of every token (on-policy distillation); raises as `read_ratio`."""
    advantage_M = -read_ratio(logprobs, outputs, "advantage kind teacher")
    return Estimate(advantage_M, np.zeros(len(outputs.length_N), dtype=bool))


def one_where_right(outputs: Outputs, scored: Scored) -> Estimate:
    """Return A = I(o): 1 at every token of a right output, else 0 (RFT)."""
    return Estimate(np.repeat(scored.right_N.astype(np.float64), outputs.length_N), np.isnan(scored.reward_N))


def kl_penalties(outputs: Outputs, k1_M: Floats | None, beta: float) -> dict[str, NDArray[Any]]:
    """Return beta * sum_t k1_t of each output; nothing where there is no KL in the reward."""
    if k1_M is None:
        return {}
    return {RewardMetric.KL_PENALTY: beta * np.bincount(outputs.output_of_token, k1_M, minlength=len(outputs.length_N))}


def group_advantages(outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: GroupConfig) -> Estimate:
    """Compare each output (DeepSeekMath, 4.1.2), or each step (4.1.3), with all others of its question.

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
    """Return one value per output, the same at each of its tokens."""
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
    """Normalise step rewards over all steps of all outputs of the question, then sum them from each token on."""
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


def batch_advantages(outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: BatchConfig) -> Estimate:
    """Normalise return-to-go over the batch (REINFORCE++: Hu 2025, arXiv 2501.03262).

        A-hat_t = (R_t - mean(R)) / std(R), R_t = sum_{s >= t} r_s, mean and std over all tokens of unmasked outputs

    Raises:
        ValueError: no `logprobs` where the KL is part of the reward; a baseline of the group without complete groups.
    """
    reward_N = scored.reward_N
    if config.baseline == "group_mean":
        outputs.require_groups("baseline group_mean")
        reward_N = centre(reward_N, outputs.group_N, group_statistics(reward_N, outputs.group_N, ddof=0))
    k1_M = read_k1(logprobs, outputs, config.kl_in_reward)
    reward_M = token_rewards(reward_N, outputs.length_N, k1_M, beta=config.kl_in_reward)
    # An output without reward has NaN at its last token, and so from there back at every other: it takes no part.
    return_M = np.concatenate([to_go(reward_T) for reward_T in outputs.per_output(reward_M)])
    penalties = kl_penalties(outputs, k1_M, config.kl_in_reward)
    return Estimate(normalise_batch(return_M), np.isnan(reward_N), means=penalties)


def critic_advantages(
    outputs: Outputs, scored: Scored, values: pa.Table | None, logprobs: pa.Table | None, config: GAEConfig
) -> Estimate:
    """Estimate advantages and returns from rewards (DeepSeekMath, Eq. 2) and the critic's values (4.1.1: PPO).

    Raises:
        ValueError: no `values`; no `logprobs` where the KL is part of the reward.
    """
    value_M = read_values(values, outputs)
    k1_M = read_k1(logprobs, outputs, config.kl_in_reward)
    masked_N = np.isnan(scored.reward_N)
    reward_N = np.where(masked_N, 0.0, scored.reward_N)
    reward_M = token_rewards(reward_N, outputs.length_N, k1_M, beta=config.kl_in_reward)
    advantage_M, return_M = np.empty_like(value_M), np.empty_like(value_M)
    rows = max(1, _CELLS // max(1, int(outputs.length_N.max())))
    for start in range(0, len(masked_N), rows):
        length_B = outputs.length_N[start : start + rows]
        first = int(outputs.length_N[:start].sum())
        tokens = slice(first, first + int(length_B.sum()))
        advantage_M[tokens], return_M[tokens] = _block(reward_M[tokens], value_M[tokens], length_B, config)
    if config.whiten == "batch":
        advantage_M = normalise_batch(np.where(masked_N[outputs.output_of_token], np.nan, advantage_M))
    penalties = kl_penalties(outputs, k1_M, config.kl_in_reward)
    return Estimate(advantage_M, masked_N, return_M=return_M, means=penalties)


def _block(reward_M: Floats, value_M: Floats, length_B: NDArray[np.int64], config: GAEConfig) -> tuple[Floats, Floats]:
    """Return advantages and returns of some outputs, padded to the longest; no value depends on which are together."""
    mask_BT = np.arange(length_B.max()) < length_B[:, None]
    reward_BT, value_BT = np.zeros(mask_BT.shape), np.zeros(mask_BT.shape)
    reward_BT[mask_BT], value_BT[mask_BT] = reward_M, value_M
    found = gae(reward_BT, value_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    return found.advantage_BT[mask_BT], found.return_BT[mask_BT]


def pair_advantages(outputs: Outputs, scored: Scored) -> Estimate:
    """Pair the i-th right output of each question with its i-th wrong one, in the order of samples: +1 and -1 (DPO, A.1.4).

    An output without a verdict (null reward) is neither right nor wrong.

    Raises:
        ValueError: questions without samples 0 .. G-1.
    """
    outputs.require_groups("a preference")
    scored_N = ~np.isnan(scored.reward_N)
    sides = (scored_N & scored.right_N, scored_N & ~scored.right_N)
    counts = [np.bincount(outputs.group_N[side], minlength=len(outputs.names)) for side in sides]
    pairs_Q = np.minimum(*counts)
    number_Q = np.cumsum(pairs_Q) - pairs_Q
    in_order = np.lexsort((outputs.sample_N, outputs.group_N))
    pair_N, sign_N = np.full(len(scored_N), -1), np.zeros(len(scored_N))
    for side, count_Q, sign in zip(sides, counts, (1.0, -1.0), strict=True):
        rows = in_order[side[in_order]]
        group = outputs.group_N[rows]
        rank = np.arange(len(rows)) - (np.cumsum(count_Q) - count_Q)[group]
        paired = rank < pairs_Q[group]
        pair_N[rows[paired]] = (number_Q[group] + rank)[paired]
        sign_N[rows[paired]] = sign
    return Estimate(np.repeat(sign_N, outputs.length_N), pair_N < 0, pair_N=pair_N)
