"""Per-token estimators of D_KL[pi_theta || pi_ref], from log-probabilities of the sampled tokens (Schulman, 2020).

Shapes: B rows, T tokens. All take float32 (or better) and return nats per token, unmasked.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k3"]


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """pi_ref/pi_theta - log(pi_ref/pi_theta) - 1, never negative (DeepSeekMath, Eq. 4).

    Its gradient with respect to log pi_theta is -(pi_ref/pi_theta - 1), the KL part of Eq. 21. That is not the gradient of the
    reverse KL (see docs/decisions.md); it is the paper's.
    """
    log_ratio_BT = ref_logp_BT - logp_BT
    # expm1 keeps full precision where the policies agree; exp(x) - 1 would round small divergences to 0.
    return torch.expm1(log_ratio_BT) - log_ratio_BT
