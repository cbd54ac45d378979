"""Per-token estimators of D_KL[pi_theta || pi_ref] from log-probabilities of tokens sampled from pi_theta (Schulman, 2020).

Shapes: B rows, T tokens. All take float32 (or better) and return nats per token, unmasked. As values k1, k3 and k3_unbiased
estimate the divergence without bias. As *losses* they differ, since the samples are not differentiated:

    estimator      gradient with respect to log pi_theta    in expectation over pi_theta
    k1             1                                        0: no effect at all
    k2             log(pi_theta / pi_ref)                   gradient of D_KL[pi_theta || pi_ref]
    k3             1 - pi_ref / pi_theta                    gradient of D_KL[pi_ref || pi_theta]  (the paper's, Eq. 21)
    k3_unbiased    log(pi_theta / pi_ref) at r = 1          gradient of D_KL[pi_theta || pi_ref]
"""

from __future__ import annotations

import torch
from torch import Tensor


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
