"""Soft punishment of overlong outputs (DAPO: Yu et al. 2025, arXiv 2503.14476, Eq. 13)."""

from __future__ import annotations

__all__ = ["overlong_score"]


def overlong_score(tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """R(o) = 0 while |o| <= L_max - L_cache, ((L_max - L_cache) - |o|) / L_cache up to L_max, -1 beyond."""
    return -min(max(tokens - (max_tokens - buffer_tokens), 0) / buffer_tokens, 1.0)
