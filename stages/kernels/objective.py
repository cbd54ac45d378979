"""Policy objectives, per token and unreduced: the caller masks, aggregates and negates in one visible place.

Legend: B rows (outputs o_i), T tokens of an output, padded. Log-probabilities are in nats, of the sampled tokens, at the
temperature they were sampled with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.kernels.divergence import k3

__all__ = ["GRPOTerms", "grpo", "sequence_mean_weights"]


@dataclass(frozen=True)
class GRPOTerms:
    """The parts of Eq. 3 for each token, all [B, T]."""

    objective_BT: Tensor
    """min[r A, clip(r) A] - beta D_KL: what is maximised."""
    ratio_BT: Tensor
    """r = pi_theta / pi_old."""
    kl_BT: Tensor
    """D_KL[pi_theta || pi_ref] by k3; zeros where beta = 0 gives no reference."""
    clipped_BT: Tensor
    """True where the clipped branch is the smaller one, so that the token's policy gradient is zero."""


def grpo(
    logp_BT: Tensor, old_logp_BT: Tensor, ref_logp_BT: Tensor | None, advantage_BT: Tensor, *, eps: float, beta: float
) -> GRPOTerms:
    """The braces of the GRPO objective (DeepSeekMath, Eq. 3), with the divergence of Eq. 4 inside them.

        min[ r A, clip(r, 1 - eps, 1 + eps) A ] - beta * ( pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 )

    Args:
        logp_BT: log pi_theta, with gradient.
        old_logp_BT: log pi_old; `logp_BT.detach()` on the first update after sampling, which makes r exactly 1.
        ref_logp_BT: log pi_ref; None only where beta is 0.
        advantage_BT: A-hat, constant with respect to theta.
        eps: clip range (the paper gives no value).
        beta: KL coefficient (the paper: 0.04).
    """
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    unclipped_BT = ratio_BT * advantage_BT
    clipped_BT = ratio_BT.clamp(1 - eps, 1 + eps) * advantage_BT
    objective_BT = torch.minimum(unclipped_BT, clipped_BT)
    kl_BT = torch.zeros_like(logp_BT)
    if ref_logp_BT is not None:
        kl_BT = k3(logp_BT, ref_logp_BT)
        objective_BT = objective_BT - beta * kl_BT
    return GRPOTerms(objective_BT, ratio_BT.detach(), kl_BT.detach(), (clipped_BT < unclipped_BT).detach())


def sequence_mean_weights(mask_BT: Tensor, weight_B: Tensor, *, outputs: float) -> Tensor:
    """Weight of each token under (1/G) sum_i (1/|o_i|) sum_t, the paper's aggregation; sums to 1 over a whole batch.

    Args:
        mask_BT: 1 on the tokens of o_i (its sampled end-of-sequence token included), 0 on padding.
        weight_B: how many equal outputs the row stands for.
        outputs: number of outputs in the *whole* batch (questions * G), over all micro-batches and ranks, so that a sum over
            micro-batches is the batch's mean whatever their sizes.
    """
    length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mask_BT * weight_B[:, None] / (length_B1 * outputs)
