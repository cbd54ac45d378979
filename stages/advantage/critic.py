"""Generalised advantages of a learned value function (DeepSeekMath, 4.1.1: PPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stages.advantage.config import GAEConfig
from stages.advantage.estimate import Estimate, kl_penalties
from stages.advantage.inputs import Outputs, Scored, read_k1, read_values

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["critic_advantages"]

_CELLS: Final = 2**21
"""Places of a block of padded outputs: one long output among short ones must not pad all of them."""


def critic_advantages(
    outputs: Outputs, scored: Scored, values: pa.Table | None, logprobs: pa.Table | None, config: GAEConfig
) -> Estimate:
    """A-hat and return of every token, from rewards (Eq. 2) and the critic's values.

    Raises:
        ValueError: no `values`; no `logprobs` where the KL is part of the reward.
    """
    import numpy as np

    from stages.kernels.advantage import normalise_batch, token_rewards

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
    """Advantages and returns of some outputs, padded to the longest of them; no value depends on which are together."""
    import numpy as np

    from stages.kernels.gae import gae

    mask_BT = np.arange(length_B.max()) < length_B[:, None]
    reward_BT, value_BT = np.zeros(mask_BT.shape), np.zeros(mask_BT.shape)
    reward_BT[mask_BT], value_BT[mask_BT] = reward_M, value_M
    found = gae(reward_BT, value_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    return found.advantage_BT[mask_BT], found.return_BT[mask_BT]
