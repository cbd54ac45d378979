"""Rollout engine and trainer: how far their log-probabilities of the sampled tokens differ, and weights that correct for it.

    d_t = log pi_trainer(o_t) - log pi_engine(o_t), in nats, o_t drawn from pi_engine

With equal weights, temperature and filters only rounding makes d other than 0: engines round differently (other kernels, other
precision). Differences are measured in float64: those of interest are the last bits of float32 numbers.

A correction weighs the surrogate by w = pi_old / pi_engine, truncated at a cap C and constant with respect to theta. It is not
the ratio pi_theta / pi_old, which keeps its own clipping (Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"; Ionides 2008 for the truncation).

Shapes: R outputs, O tokens of the longest, N any number of outputs; `mask_RO` is True on output tokens. Corrections: B rows, T
tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.objective import k3


class TokenMismatch(NamedTuple):
    """Sums over the tokens of R outputs, so that parts of a batch add up."""

    tokens: int
    difference: float
    """Sum of |d|."""
    largest: float
    """Largest |d|."""
    divergence: float
    """Sum of k3, pi_trainer/pi_engine - log(pi_trainer/pi_engine) - 1: its mean estimates D_KL[pi_engine || pi_trainer] per
    token without bias, since pi_engine sampled (Schulman 2020)."""
    log_weight_R: Tensor
    """log w of each output, w = prod_t pi_trainer(o_t) / pi_engine(o_t): the importance ratio of the whole output."""


@torch.no_grad()
def token_mismatch(logp_RO: Tensor, engine_logp_RO: Tensor, mask_RO: Tensor) -> TokenMismatch:
    """Two columns of log-probabilities of the same tokens, compared."""
    wide_RO, engine_RO = logp_RO.double(), engine_logp_RO.double()
    d_RO = torch.where(mask_RO, wide_RO - engine_RO, 0.0)
    return TokenMismatch(
        tokens=int(mask_RO.sum()),
        difference=float(d_RO.abs().sum()),
        largest=float(d_RO.abs().max()),
        divergence=float(torch.where(mask_RO, k3(engine_RO, wide_RO), 0.0).sum()),
        log_weight_R=d_RO.sum(-1),
    )


class WeightSums(NamedTuple):
    """Sums over importance weights; those of parts of a batch, taken with one shift, add up."""

    weights: float
    """sum w e^-shift"""
    squares: float
    """sum w^2 e^-2 shift"""


def weight_sums(log_weight_N: Tensor, *, shift: float) -> WeightSums:
    """First and second moment sums of w = exp(log_weight).

    Args:
        shift: the largest log weight of the whole batch. It cancels in the effective sample size, and without it the weights
            of long outputs overflow, or are all rounded to 0.
    """
    scaled_N = torch.exp(log_weight_N.double() - shift)
    return WeightSums(float(scaled_N.sum()), float(scaled_N.square().sum()))


def effective_share(sums: WeightSums, count: int) -> float:
    """(sum w)^2 / (n sum w^2): effective sample size over n, in (0, 1] (Kish 1965; Kong 1992 for importance sampling).

    1: every output counts alike, as if the trainer's policy had sampled them; 1/n: a single one decides everything.
    """
    return sums.weights**2 / (count * sums.squares)


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
