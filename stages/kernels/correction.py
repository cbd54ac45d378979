"""Importance weights for outputs that the rollout engine drew from a slightly other distribution than the trainer computes.

Rollout engines round differently (other kernels, other precision): pi_rollout is not pi_old although the weights are equal. The
weight w = pi_old / pi_rollout, truncated at a cap C, multiplies the surrogate and is constant with respect to theta. It is not
the ratio pi_theta / pi_old, which keeps its own clipping (Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"; Ionides 2008 for the truncation).

Shapes: B rows, T tokens; `mask_BT` is 1 on output tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_truncated(old_logp_BT: Tensor, rollout_logp_BT: Tensor, *, cap: float) -> Tensor:
    """w_t = min(pi_old(o_t) / pi_rollout(o_t), C) at each token."""
    return torch.exp(old_logp_BT - rollout_logp_BT).clamp(max=cap).detach()


def sequence_truncated(
    old_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, *, cap: float, normalised: bool = False
) -> Tensor:
    """w = min(pi_old(o) / pi_rollout(o), C) of the whole output, at each of its tokens: unbiased up to the cap, but of
    higher variance the longer the output.

    `normalised`: w = min((pi_old(o) / pi_rollout(o))^(1 / |o|), C), the geometric mean of the tokens' weights, as in GSPO's
    ratio: biased, and of the same spread for any length.
    """
    log_ratio_B1 = (mask_BT * (old_logp_BT - rollout_logp_BT)).sum(-1, keepdim=True)
    if normalised:
        log_ratio_B1 = log_ratio_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(log_ratio_B1).clamp(max=cap).expand_as(old_logp_BT).detach()
