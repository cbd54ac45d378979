"""How far the trainer's log-probabilities lie from those that the rollout engine recorded for the tokens it sampled.

    d_t = log pi_trainer(o_t) - log pi_engine(o_t), in nats, o_t drawn from pi_engine

With equal weights, temperature and filters only rounding makes d other than 0. Everything here is in float64: the differences
of interest are the last bits of float32 numbers.

Shapes: R outputs, O tokens of the longest, N any number of outputs; `mask_RO` is True on output tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.divergence import k3


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
