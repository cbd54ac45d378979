"""Generalised advantages of a learned value function (DeepSeekMath, 4.1.1: PPO)."""

from __future__ import annotations

from stages.advantage.config import GAEConfig
from stages.advantage.estimate import Estimate
from stages.advantage.inputs import Outputs, Scored, read_k1, read_values
from stages.tables import Logprobs, Values

__all__ = ["critic_advantages"]


def critic_advantages(
    outputs: Outputs, scored: Scored, values: Values | None, logprobs: Logprobs | None, config: GAEConfig
) -> Estimate:
    """A-hat and return of every token, from rewards (Eq. 2) and the critic's values.

    Raises:
        ValueError: no `values`; no `logprobs` where the KL is part of the reward.
    """
    import numpy as np

    from stages.kernels.advantage import normalise_batch, token_rewards
    from stages.kernels.gae import gae

    value_M = read_values(values, outputs)
    k1_M = read_k1(logprobs, outputs, config.kl_in_reward)
    masked_N = np.isnan(scored.reward_N)
    reward_N = np.where(masked_N, 0.0, scored.reward_N)
    reward_M = token_rewards(reward_N, outputs.length_N, k1_M, beta=config.kl_in_reward)
    mask_BT = np.arange(outputs.length_N.max()) < outputs.length_N[:, None]
    reward_BT, value_BT = np.zeros(mask_BT.shape), np.zeros(mask_BT.shape)
    reward_BT[mask_BT], value_BT[mask_BT] = reward_M, value_M
    found = gae(reward_BT, value_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    advantage_M = found.advantage_BT[mask_BT]
    if config.whiten == "batch":
        advantage_M = normalise_batch(np.where(masked_N[outputs.output_of_token], np.nan, advantage_M))
    metrics = {}
    if k1_M is not None:
        metrics["reward/kl_penalty"] = float(config.kl_in_reward * k1_M.sum() / len(outputs.keys))
    return Estimate(advantage_M, masked_N, return_M=found.return_BT[mask_BT], metrics=metrics)
