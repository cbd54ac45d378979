"""What each kind of advantage returns, and what the kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.advantage.inputs import Outputs, Scored

    Floats = NDArray[np.float64]

__all__ = ["Estimate", "answer_metrics"]


@dataclass(frozen=True)
class Estimate:
    """Advantages of N outputs with M tokens in all."""

    advantage_M: Floats
    """A-hat of every token, output after output."""
    masked_N: NDArray[np.bool_]
    """Outputs that take no part in the loss, whatever `advantage_M` has at their tokens."""
    return_M: Floats | None = None
    """What the critic shall predict before every token."""
    pair_N: Sequence[int | None] | None = None
    """The preference that an output belongs to."""
    metrics: dict[str, float] = field(default_factory=dict)


def answer_metrics(outputs: Outputs, scored: Scored) -> dict[str, float]:
    """Shares of questions that all outputs answer rightly, and that none does."""
    import numpy as np

    right_Q = np.bincount(outputs.group_N, weights=scored.right_N) / np.bincount(outputs.group_N)
    return {
        "reward/frac_all_correct": float((right_Q == 1).mean()),
        "reward/frac_all_wrong": float((right_Q == 0).mean()),
    }
