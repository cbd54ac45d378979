"""How scores are fitted to labels: by comparison or one by one. Losses of single pairs and single scores, in nats.

Legend: P pairs, N scores.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

__all__ = ["bradley_terry", "pointwise"]


def bradley_terry(preferred_P: Tensor, other_P: Tensor) -> Tensor:
    """-log sigma(s+ - s-) of each pair (Bradley and Terry 1952; as a reward's loss Ouyang et al. 2022, Eq. 1): `[P]`.

    Only differences within pairs count: adding one number to all scores of a question changes nothing. Slope in s+:
    -sigma(s- - s+).
    """
    return -logsigmoid(preferred_P - other_P)


def pointwise(score_N: Tensor, label_N: Tensor) -> Tensor:
    """-y log sigma(s) - (1 - y) log(1 - sigma(s)) of each score (Math-Shepherd: Wang et al. 2023b, Eq. 1 and 2): `[N]`.

    sigma(s) then estimates the probability that the label is 1. Labels between 0 and 1 are shares. Slope in s: sigma(s) - y.
    """
    return binary_cross_entropy_with_logits(score_N, label_N, reduction="none")
