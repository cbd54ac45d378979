"""Group-relative advantages: outcome supervision (DeepSeekMath, 4.1.2) and process supervision (4.1.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.advantage.config import GroupConfig
from stages.advantage.estimate import Estimate, kl_penalties
from stages.advantage.inputs import Outputs, Scored, read_k1
from stages.reward_metrics import RewardMetric

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from stages.kernels.advantage import GroupStatistics

    Floats = NDArray[np.float64]

__all__ = ["group_advantages", "require_steps"]


def group_advantages(outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: GroupConfig) -> Estimate:
    """A-hat of each output, or of each step, against all others of its question.

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
    import numpy as np

    from stages.kernels.advantage import group_statistics

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
    import numpy as np

    from stages.kernels.advantage import group_statistics, process_advantages

    _check_step_rewards(outputs, scored)
    masked_N = np.array([steps is None for steps in scored.steps])
    # An output without steps keeps a place (NaN takes no part), so that no question is without values.
    values = [steps.rewards if steps and steps.rewards else [np.nan] for steps in scored.steps]
    value_S = np.array([reward for row in values for reward in row], dtype=np.float64)
    group_S = np.repeat(outputs.group_N, [len(row) for row in values])
    statistics = group_statistics(value_S, group_S, ddof=config.ddof)
    compared = np.split(_compare(value_S, group_S, statistics, config), np.cumsum([len(row) for row in values])[:-1])
    advantages = [
        process_advantages(step_K, steps.ends, length) if steps and steps.ends else np.zeros(length)
        for step_K, steps, length in zip(compared, scored.steps, outputs.length_N.tolist(), strict=True)
    ]
    counts = np.array([len(steps.rewards) for steps in scored.steps if steps is not None])
    means = {RewardMetric.STEPS_MEAN: counts, RewardMetric.STD_WITHIN_GROUP: statistics.std_Q}
    return Estimate(np.concatenate(advantages), masked_N, means=means), statistics.degenerate_Q


def _compare(value_N: Floats, group_N: NDArray[np.int64], statistics: GroupStatistics, config: GroupConfig) -> Floats:
    from stages.kernels.advantage import centre, leave_one_out, normalise

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


def _check_step_rewards(outputs: Outputs, scored: Scored) -> None:
    """Refuses an output that has a reward and no steps; one that has neither is masked."""
    import numpy as np

    for key, steps, reward in zip(outputs.keys, scored.steps, scored.reward_N, strict=True):
        if steps is None and not np.isnan(reward):
            raise ValueError(f"supervision process: {key} has a reward and no step rewards; score all outputs by steps")
