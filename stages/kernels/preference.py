"""What is learned from preferences and labels: DPO over pairs of outputs, and the losses that fit scores to labels, in nats.

Of DPO's rows 0, 2, 4, ... are preferred to the rows right after them. Legend: B = 2 P rows, T tokens, P pairs, N scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from stages.kernels.objective import Surrogate


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
