"""On-policy distillation: the policy's own outputs, judged token by token by a teacher (GKD: arXiv 2306.13649)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, clipped_ratio


class DistillationConfig(Config):
    """On-policy distillation: the policy gradient of minus the reverse KL of each token to a teacher, which `teacher` names.

    The sources average over an output's tokens or sum over all; here all tokens of the batch are weighed alike.
    """

    ROW: ClassVar = Row(
        "Distillation",
        ("policy",),
        "-",
        "log (pi_teacher / pi_theta)",
        ("teacher",),
        "it learns from what a teacher says of each token, and from no reward (arXiv 2306.13649)",
        uses_ratio=True,
        rewards=(),
    )
    kind: Literal["distillation"] = "distillation"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio, PPO's; without effect at one update per exploration stage."


def distillation(config: DistillationConfig) -> Method:
    """(1 / sum_i |o_i|) sum_i sum_t min[ r A, clip(r) A ]."""
    return Method(clipped_ratio(config.eps, config.eps), "token_mean")
