"""From per-token values to one number: the weight of every token, over a whole batch whatever its micro-batches.

Each function divides by a count of the *whole* batch (over all micro-batches and ranks), so that plain sums over micro-batches
add up to the batch's own mean. Means of micro-batch means would not, unless all were of one size.

Shapes: B rows (outputs o_i), T tokens. `mask_BT` is 1 on the tokens of o_i (its sampled end-of-sequence token included) and 0
on padding; `weight_B` says how many equal outputs a row counts for. Weights are float64: the loss casts them.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
