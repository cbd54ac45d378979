"""REINFORCE++ (Hu 2025, arXiv 2501.03262): return-to-go normalised over all tokens of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.advantage.config import BatchConfig
from stages.advantage.estimate import Estimate, kl_penalties
from stages.advantage.inputs import Outputs, Scored, read_k1

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["batch_advantages"]


def batch_advantages(outputs: Outputs, scored: Scored, logprobs: pa.Table | None, config: BatchConfig) -> Estimate:
    """A-hat_t = (R_t - mean(R)) / std(R), R_t = sum_{s >= t} r_s, mean and std over all tokens of unmasked outputs.

    Raises:
        ValueError: no `logprobs` where the KL is part of the reward; a baseline of the group without complete groups.
    """
    import numpy as np

    from stages.kernels.advantage import centre, group_statistics, normalise_batch, to_go, token_rewards

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
