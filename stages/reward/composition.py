"""One reward from the scores of its components, with a declared meaning for a score that is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.reward.config import Missing

__all__ = ["Part", "compose"]


@dataclass(frozen=True)
class Part:
    """One component's contribution to one output."""

    score: float | None
    weight: float
    missing: Missing


def compose(parts: Sequence[Part]) -> float | None:
    """Weighted sum of the scores; None where a component that decides has none.

        r = sum_j w_j s_j

    `zero` counts a missing score as 0. `rescale` leaves the component out and scales the rest to the same total weight, so
    that an output is not punished for a component's silence. Where nothing is left there is no reward, never 0.
    """
    if any(part.score is None and part.missing == "no_reward" for part in parts):
        return None
    counted = [part for part in parts if part.score is not None or part.missing == "zero"]
    total = sum(part.weight * (part.score or 0.0) for part in counted)
    if len(counted) == len(parts):
        return total
    weight_left = sum(part.weight for part in counted)
    return total * sum(part.weight for part in parts) / weight_left if weight_left else None
