"""Log-probabilities of given tokens and entropy of the next-token distribution, in float32 or better.

Half precision is widened to float32; float64 logits stay float64 from end to end, which is what checks of formulas by numbers
need. Where the logits themselves would be too many: `stages.kernels.head`. Shapes: N scored positions, n those of a chunk, V
vocabulary. Values are in nats.

**Mismatch**: how far rollout engine and trainer differ in the sampled tokens, and weights that correct for it.

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

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.kernels.objective import k3

_CHUNK = 1 << 22
"""Logits widened to float32 at a time (16 MiB): the [N, V] logits themselves are kept in their own precision only."""


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi(token) = x[token] - logsumexp(x) with x = logits / T: `[N]`.

    Half precision would round -8.1 to -8.125, a ratio of 1.025 out of nothing. Only the logits are kept for backward; their
    softmax is recomputed there, chunk by chunk.
    """
    logp_N: Tensor = _TokenLogprobs.apply(logits_NV, tokens_N, temperature)  # type: ignore[no-untyped-call]
    return logp_N


@torch.no_grad()
def entropies(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """H = logsumexp(x) - sum softmax(x) x with x = logits / T, without gradient: `[N]`."""
    parts = []
    for rows in _chunks(logits_NV):
        x_nV = _scaled(logits_NV[rows], temperature)
        parts.append(entropy_given(x_nV, x_nV.logsumexp(-1)))
    return torch.cat(parts) if parts else logits_NV.new_zeros(0, dtype=precision(logits_NV))


def entropy_given(x_nV: Tensor, log_total_n: Tensor) -> Tensor:
    """H of the distributions softmax(x), given their logsumexp: `[n]`. `x_nV` is overwritten."""
    softmax_nV = (x_nV - log_total_n.unsqueeze(-1)).exp_()
    # 0 * log 0 = 0 for tokens that a mask made impossible (-inf).
    terms_nV = softmax_nV.mul_(x_nV.clamp_(min=torch.finfo(x_nV.dtype).min))
    return log_total_n - terms_nV.sum(-1)


def precision(logits: Tensor) -> torch.dtype:
    """What is computed in: float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(logits.dtype, torch.float32)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
        logp_N = logits_NV.new_empty(len(tokens_N), dtype=precision(logits_NV))
        log_total_N = torch.empty_like(logp_N)
        for rows in _chunks(logits_NV):
            x_nV = _scaled(logits_NV[rows], temperature)
            log_total_N[rows] = x_nV.logsumexp(-1)
            logp_N[rows] = x_nV.gather(-1, tokens_N[rows].unsqueeze(-1)).squeeze(-1) - log_total_N[rows]
        ctx.save_for_backward(logits_NV, tokens_N, log_total_N)
        ctx.temperature = temperature
        return logp_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d logp / d logits = (one-hot(token) - softmax(x)) / T."""
        logits_NV, tokens_N, log_total_N = ctx.saved_tensors
        weight_N = gradients[0] / ctx.temperature
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            x_nV = _scaled(logits_NV[rows], ctx.temperature)
            weight_n1 = weight_N[rows].unsqueeze(-1)
            softmax_nV = x_nV.sub_(log_total_N[rows].unsqueeze(-1)).exp_()
            softmax_nV.mul_(-weight_n1).scatter_add_(-1, tokens_N[rows].unsqueeze(-1), weight_n1)
            gradient_NV[rows] = softmax_nV.to(gradient_NV.dtype)
        return gradient_NV, None, None


def _scaled(logits_nV: Tensor, temperature: float) -> Tensor:
    """A copy of the logits in working precision, divided by the temperature."""
    x_nV = logits_nV.to(precision(logits_nV), copy=True)
    return x_nV if temperature == 1.0 else x_nV.div_(temperature)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // logits_NV.shape[-1])
    return (slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows))


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
