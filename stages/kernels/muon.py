"""Muon's orthogonalisation (Newton-Schulz), for many matrices of one shape at once and in a chosen precision.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/, with the coefficients of `torch.optim.Muon`. That function
always computes in bfloat16, which a CPU without bfloat16 instructions emulates about forty times slower than float32.

Shapes: N matrices of R rows and C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(
    matrices_NRC: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition U S V^T (singular values end in about 0.7-1.2).

    `steps` times X <- a X + (b G + c G G) X with G = X X^T, from X scaled to a Frobenius norm of at most 1.
    """
    a, b, c = coefficients
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.to(dtype)
    x = x.mT if tall else x  # G is then the smaller of the two Gram matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_NRC.dtype)
