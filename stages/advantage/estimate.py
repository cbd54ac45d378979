"""What each kind of advantage returns, and what the kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.reward_metrics import RewardMetric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.advantage.inputs import Outputs, Scored

    Floats = NDArray[np.float64]

__all__ = ["Estimate", "answer_shares", "kl_penalties"]


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
    means: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Figures whose means are metrics, of questions or of outputs."""


def answer_shares(outputs: Outputs, scored: Scored) -> dict[str, NDArray[Any]]:
    """Questions that all outputs answer rightly, and that none does."""
    import numpy as np

    right_Q = np.bincount(outputs.group_N, weights=scored.right_N) / np.bincount(outputs.group_N)
    return {RewardMetric.ALL_CORRECT: right_Q == 1, RewardMetric.ALL_WRONG: right_Q == 0}


def kl_penalties(outputs: Outputs, k1_M: Floats | None, beta: float) -> dict[str, NDArray[Any]]:
    """beta * sum_t k1_t of each output; nothing where there is no KL in the reward."""
    import numpy as np

    if k1_M is None:
        return {}
    return {RewardMetric.KL_PENALTY: beta * np.bincount(outputs.output_of_token, k1_M, minlength=len(outputs.length_N))}
