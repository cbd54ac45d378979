"""What policy-gradient methods maximise, per token and unreduced: the caller masks, weighs, subtracts the KL term and negates.

Legend: B rows (outputs o_i), T tokens of an output, padded. Log-probabilities are in nats, of the sampled tokens, at the
temperature they were sampled with. r_{i,t} = pi_theta / pi_old at the sampled token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """One method's objective for each token, before the KL term; all [B, T]."""

    value_BT: Tensor
    """What is maximised, with gradient; outside the outputs it means nothing and gets weight 0."""
    ratio_BT: Tensor
    """The ratio that the method uses, detached; ones where it uses none."""
    clipped_BT: Tensor
    """True where clipping took the token's policy gradient away or bounded its weight."""
    shown: dict[str, Tensor] = field(default_factory=dict)
    """Further quantities worth a chart, detached, by metric name."""


def weighted_likelihood(logp_BT: Tensor, advantage_BT: Tensor) -> Surrogate:
    """A log pi_theta: SFT (A = 1), RFT and Online RFT (A = I(o), DeepSeekMath Eq. 8-11), REINFORCE and RLOO.

    Its gradient is A grad log pi_theta: the advantage is the gradient coefficient itself.
    """
    return Surrogate(advantage_BT * logp_BT, torch.ones_like(logp_BT), torch.zeros_like(logp_BT, dtype=torch.bool))


def clipped(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, *, eps_low: float, eps_high: float
) -> Surrogate:
    """min[ r A, clip(r, 1 - eps_low, 1 + eps_high) A ]: PPO and GRPO (DeepSeekMath, Eq. 1 and 3) with equal eps.

    Args:
        logp_BT: log pi_theta, with gradient.
        old_logp_BT: log pi_old; `logp_BT.detach()` on the first update after sampling, which makes r exactly 1.
        advantage_BT: A-hat, constant with respect to theta.
        eps_low, eps_high: clip range; unequal ones are DAPO's clip-higher (arXiv 2503.14476, Eq. 10).
    """
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    free_BT = ratio_BT * advantage_BT
    bound_BT = ratio_BT.clamp(1 - eps_low, 1 + eps_high) * advantage_BT
    return Surrogate(torch.minimum(free_BT, bound_BT), ratio_BT.detach(), (bound_BT < free_BT).detach())


def sequence_clipped(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, eps_low: float, eps_high: float
) -> Surrogate:
    """GSPO-token (Zheng et al. 2025, arXiv 2507.18071, Eq. 13-14): one length-normalised ratio per output for all its tokens.

        s_i = exp( (1/|o_i|) sum_t log r_{i,t} )        s_{i,t} = sg[s_i] pi_theta(o_{i,t}) / sg[pi_theta(o_{i,t})]

        min[ s_{i,t} A_{i,t}, clip(s_{i,t}, 1 - eps_low, 1 + eps_high) A_{i,t} ]

    Every token keeps its own advantage. Where those of an output are equal, the mean over its tokens has the value, the
    clipping and the gradient of GSPO (its Eq. 5-7).
    """
    length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
    mean_B1 = (mask_BT * (logp_BT - old_logp_BT)).sum(-1, keepdim=True) / length_B1
    # log s_{i,t}: its value is the output's, its gradient the token's own.
    log_ratio_BT = mean_B1.detach() + logp_BT - logp_BT.detach()
    return clipped(log_ratio_BT, torch.zeros_like(logp_BT), advantage_BT, eps_low=eps_low, eps_high=eps_high)


def clipped_weight(logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, *, eps_high: float) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4-5): sg[ min(r, 1 + eps_high) ] A log pi_theta.

    Clips the weight and keeps the gradient of every token; sg[] is constant with respect to theta. As in its experiments
    there is no lower bound.
    """
    ratio_BT = torch.exp(logp_BT - old_logp_BT).detach()
    weight_BT = ratio_BT.clamp(max=1 + eps_high)
    return Surrogate(weight_BT * advantage_BT * logp_BT, ratio_BT, weight_BT < ratio_BT)
