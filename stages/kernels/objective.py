"""The parts of an objective (DeepSeekMath, Eq. 3): a surrogate for each token, the KL term, and the weight of each token.

    J = sum_{i,t} weight_{i,t} ( surrogate_{i,t} - beta KL_{i,t} )

The caller masks, weighs, subtracts the KL term and negates.

Legend: B rows (outputs o_i), T tokens of an output, padded. Log-probabilities are in nats, of the sampled tokens, at the
temperature they were sampled with. r_{i,t} = pi_theta / pi_old at the sampled token.

**KL.** Estimators of D_KL[pi_theta || pi_ref] from log-probabilities of tokens sampled from pi_theta (Schulman, 2020). All take
float32 (or better) and return nats per token, unmasked. As values k1, k3 and k3_unbiased estimate the divergence without bias.
As *losses* they differ, since the samples are not differentiated:

    estimator      gradient with respect to log pi_theta    in expectation over pi_theta
    k1             1                                        0: no effect at all
    k2             log(pi_theta / pi_ref)                   gradient of D_KL[pi_theta || pi_ref]
    k3             1 - pi_ref / pi_theta                    gradient of D_KL[pi_ref || pi_theta]  (the paper's, Eq. 21)
    k3_unbiased    log(pi_theta / pi_ref) at r = 1          gradient of D_KL[pi_theta || pi_ref]

**Weights** of tokens divide by a count of the *whole* batch (over all micro-batches and ranks), so that plain sums over
micro-batches add up to the batch's own mean. `mask_BT` is 1 on the tokens of o_i (its sampled end-of-sequence token included)
and 0 on padding; `weight_B` says how many equal outputs a row counts for. Weights are float64: the loss casts them.

**Preferences and labels**: DPO over pairs of outputs, and the losses that fit scores to labels, in nats. Of DPO's B = 2 P rows
0, 2, 4, ... are preferred to the rows right after them. N scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


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


def k1(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """log(pi_theta / pi_ref); of either sign. The penalty inside PPO's reward (DeepSeekMath, Eq. 2)."""
    return logp_BT - ref_logp_BT


def k2(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """(1/2) log(pi_theta / pi_ref)^2: biased as a value, right as a loss on-policy."""
    return 0.5 * (logp_BT - ref_logp_BT).square()


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """pi_ref/pi_theta - log(pi_ref/pi_theta) - 1, never negative (DeepSeekMath, Eq. 4)."""
    log_ratio_BT = ref_logp_BT - logp_BT
    # expm1 keeps full precision where the policies agree; exp(x) - 1 would round small divergences to 0.
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def k3_unbiased(logp_BT: Tensor, ref_logp_BT: Tensor, old_logp_BT: Tensor) -> Tensor:
    """(pi_theta / pi_old) k3, differentiated through the ratio too (DeepSeek-V3.2, arXiv 2512.02556)."""
    return torch.exp(logp_BT - old_logp_BT) * k3(logp_BT, ref_logp_BT)


def sequence_mean_weights(mask_BT: Tensor, weight_B: Tensor, *, outputs: float) -> Tensor:
    """(1/G) sum_i (1/|o_i|) sum_t: the paper's (DeepSeekMath, Eq. 3). For lengths 2 and 6: 1/4 and 1/12 a token.

    Args:
        outputs: number of outputs in the whole batch (questions * G).
    """
    mask_BT = mask_BT.to(torch.float64)
    length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mask_BT * weight_B.to(torch.float64)[:, None] / (length_B1 * outputs)


def token_mean_weights(mask_BT: Tensor, weight_B: Tensor, *, tokens: float) -> Tensor:
    """(1 / sum_i |o_i|) sum_i sum_t: every token alike (DAPO, arXiv 2503.14476, Eq. 12). Lengths 2 and 6: 1/8 and 1/8.

    Args:
        tokens: number of output tokens in the whole batch.
    """
    return mask_BT.to(torch.float64) * weight_B.to(torch.float64)[:, None] / tokens


def constant_weights(mask_BT: Tensor, weight_B: Tensor, *, outputs: float, length: float) -> Tensor:
    """(1/G) sum_i (1/L) sum_t with one L for all outputs (Dr. GRPO, arXiv 2503.20783). Lengths 2 and 6, L = 8: 1/16 each.

    Args:
        outputs: number of outputs in the whole batch.
        length: L, for example the longest output allowed; 1 sums over the tokens of an output.
    """
    return mask_BT.to(torch.float64) * weight_B.to(torch.float64)[:, None] / (outputs * length)


def dpo(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, *, beta: float, length_normalised: bool) -> Surrogate:
    """log sigma( beta m(o+) - beta m(o-) ) with m(o) = (1/|o|) sum_t log[pi_theta(o_t)/pi_ref(o_t)] (DeepSeekMath, Eq. 12).

    The usual form (Rafailov et al. 2023) sums over tokens instead: `length_normalised=False`. The value is at every token
    of both outputs, so that the mean over outputs of the mean over tokens is the mean over pairs.
    """
    m_B = log_ratio_of_outputs(logp_BT - ref_logp_BT, mask_BT, length_normalised=length_normalised)
    margin_P = beta * (m_B[0::2] - m_B[1::2])
    value_B1 = logsigmoid(margin_P).repeat_interleave(2)[:, None]
    margin_BT = margin_P.detach().repeat_interleave(2)[:, None].expand_as(logp_BT)
    return Surrogate(
        value_B1.expand_as(logp_BT),
        torch.ones_like(logp_BT),
        torch.zeros_like(logp_BT, dtype=torch.bool),
        {"preference_margin": margin_BT, "preference_accuracy": (margin_BT > 0).to(logp_BT.dtype)},
    )


def log_ratio_of_outputs(log_ratio_BT: Tensor, mask_BT: Tensor, *, length_normalised: bool) -> Tensor:
    """Mean (Eq. 12) or sum over the tokens of each output: `[B]`."""
    total_B = (mask_BT * log_ratio_BT).sum(-1)
    return total_B / mask_BT.sum(-1).clamp(min=1) if length_normalised else total_B


def bradley_terry(preferred_P: Tensor, other_P: Tensor) -> Tensor:
    """-log sigma(s+ - s-) of each pair (Bradley and Terry 1952; as a reward's loss Ouyang et al. 2022, Eq. 1): `[P]`.

    Only differences within pairs count: adding one number to all scores of a question changes nothing. Slope in s+:
    -sigma(s- - s+).
    """
    return -logsigmoid(preferred_P - other_P)


def pointwise(score_N: Tensor, label_N: Tensor) -> Tensor:
    """-y log sigma(s) - (1 - y) log(1 - sigma(s)) of each score (Math-Shepherd: Wang et al. 2023b, Eq. 1 and 2): `[N]`.

    sigma(s) then estimates the probability that the label is 1. Labels between 0 and 1 are shares. Slope in s: sigma(s) - y.
    """
    return binary_cross_entropy_with_logits(score_N, label_N, reduction="none")
