"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438): what PPO weighs each token with.

DeepSeekMath, 4.1.1: "A_t is the advantage, computed by applying GAE, based on the rewards {r_>=t} and a learned value
function". The paper gives neither gamma nor lambda.

Shapes: B outputs, T token positions, right-padded. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GAE:
    """Both [B, T], 0 where the mask is."""

    advantage_BT: Floats
    """A-hat_t: how much better the token turned out than V(q, o_<t) promised."""
    return_BT: Floats
    """A-hat_t + V(q, o_<t): what the value function shall predict before the token."""


def gae(reward_BT: ArrayLike, value_BT: ArrayLike, mask_BT: ArrayLike, *, gamma: float, lam: float) -> GAE:
    """Exponentially weighted sum of temporal-difference errors, per token.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t

    Beyond an output's last token V and A are 0: every output is taken as finished. Where `length` cut it off, the caller's
    reward is all there is for the rest; the value of the unseen state is not bootstrapped.

    A masked position takes no part: `t + 1` is the next position that is not masked, so that what follows a masked stretch
    reaches back across it, undiminished. Zeroing instead would end the episode there. What `reward_BT` and `value_BT` hold
    at masked positions is never read, NaN included.

    Args:
        reward_BT: r_t, the reward received with token t.
        value_BT: V(q, o_<t), the value *before* token t.
        mask_BT: true on the tokens of an output, false on padding and on positions to be skipped.
        gamma: discount of the future, 0 .. 1; 1 does not discount.
        lam: 0 .. 1; 0 is the one-step error delta (biased by V), 1 the reward to go minus V (no bias, most variance).

    Raises:
        ValueError: arrays of different shapes, or `gamma` or `lam` outside 0 .. 1.
    """
    mask = np.asarray(mask_BT, dtype=bool)
    reward, value = (np.asarray(array, dtype=np.float64) for array in (reward_BT, value_BT))
    if mask.ndim != 2 or not mask.shape == reward.shape == value.shape:
        raise ValueError(
            f"rewards, values and mask must be matrices of one shape, found {reward.shape}, {value.shape}, {mask.shape}"
        )
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in 0 .. 1, found gamma = {gamma}, lam = {lam}")
    advantage_BT = np.zeros(mask.shape)
    next_value_B, next_advantage_B = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        delta_B = reward[:, t] + gamma * next_value_B - value[:, t]
        next_advantage_B = np.where(mask[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = np.where(mask[:, t], value[:, t], next_value_B)
        advantage_BT[mask[:, t], t] = next_advantage_B[mask[:, t]]
    return GAE(advantage_BT, np.where(mask, advantage_BT + value, 0.0))
