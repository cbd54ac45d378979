"""Preferences between the outputs of a question (DeepSeekMath, A.1.4: DPO)."""

from __future__ import annotations

from stages.advantage.estimate import Estimate
from stages.advantage.inputs import Outputs, Scored

__all__ = ["pair_advantages"]


def pair_advantages(outputs: Outputs, scored: Scored) -> Estimate:
    """The i-th right output of each question with its i-th wrong one, in the order of samples: +1 and -1.

    An output without a verdict (null reward) is neither right nor wrong.

    Raises:
        ValueError: questions without samples 0 .. G-1.
    """
    import numpy as np

    outputs.require_groups("a preference")
    right: list[list[int]] = [[] for _ in outputs.names]
    wrong: list[list[int]] = [[] for _ in outputs.names]
    for row in sorted(range(len(outputs.sample_N)), key=outputs.sample_N.__getitem__):
        if not np.isnan(scored.reward_N[row]):
            (right if scored.right_N[row] else wrong)[outputs.group_N[row]].append(row)
    pair_N: list[int | None] = [None] * len(outputs.sample_N)
    sign_N = np.zeros(len(outputs.sample_N))
    preferences = [both for group in zip(right, wrong, strict=True) for both in zip(*group, strict=False)]
    for number, (better, worse) in enumerate(preferences):
        pair_N[better] = pair_N[worse] = number
        sign_N[better], sign_N[worse] = 1.0, -1.0
    return Estimate(np.repeat(sign_N, outputs.length_N), sign_N == 0, pair_N=pair_N)
