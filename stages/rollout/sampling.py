"""Drawing tokens from next-token distributions: one uniform number a sample, by inversion."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

_BLOCK = 64
"""Tokens whose probabilities are added before any are cumulated: cumulating is sequential, adding is not."""


def sample(
    logits: torch.Tensor, row: NDArray[np.int64], uniform: NDArray[np.float64], temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One token for each sample from its row's distribution, and its log-probability there (`Output.logprobs`).

    logits `[rows, V]` float32; `row` and `uniform` `[n]`, u below 1 - 2**-40.

    Raises:
        FloatingPointError: logits that are no distribution (NaN, +inf, or nothing but -inf).
    """
    if temperature > 0:
        logits = logits / temperature
    logp = torch.log_softmax(logits, dim=-1)
    if not torch.isfinite(logp.amax(dim=-1)).all():
        raise FloatingPointError("the policy's logits are not finite: its weights are damaged or have diverged")
    index = torch.from_numpy(row).to(logits.device)
    if temperature == 0:
        token = logp.argmax(dim=-1)[index]
    else:
        token = _invert(logp.exp(), index, torch.from_numpy(uniform).to(logits.device))
    return token.cpu().numpy(), logp[index, token].cpu().numpy()


def _invert(probability: torch.Tensor, index: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulated probability exceeds u times the total: its own is positive.

    First the block of tokens is found, then the token in it. Sums are float64: float32 would lose rare tokens.
    """
    rows, vocabulary = probability.shape
    blocks = F.pad(probability, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    until = F.pad(blocks.sum(dim=-1).double().cumsum(dim=-1), (1, 0))[index]
    target = uniform[:, None] * until[:, -1:]
    block = torch.searchsorted(until[:, 1:].contiguous(), target, right=True)
    inside = blocks[index, block[:, 0]].double().cumsum(dim=-1)
    # The block's sum was rounded in another order than `inside`: stay below its end, where no token is left.
    rest = torch.minimum(target - until.gather(1, block), inside[:, -1:] * (1 - 2**-40))
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]
