"""Log-probabilities of given tokens and entropy of the next-token distribution, in float32 or better.

Half precision is widened to float32; float64 logits stay float64 from end to end, which is what checks of formulas by numbers
need. Where the logits themselves would be too many: `stages.kernels.head`. Shapes: N scored positions, n those of a chunk, V
vocabulary. Values are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
