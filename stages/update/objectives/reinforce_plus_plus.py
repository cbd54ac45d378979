"""REINFORCE++: PPO's clipping without a critic, advantages normalised over the batch (Hu 2025, arXiv 2501.03262)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, clipped_ratio


class ReinforcePlusPlusConfig(Config):
    """REINFORCE++: the KL penalty per token in the reward, returns normalised over the batch (`advantage.kind = batch`)."""

    ROW: ClassVar = Row(
        "REINFORCE++",
        ("policy",),
        "Model",
        "normalised return",
        ("batch",),
        "its advantage is normalised over the batch (arXiv 2501.03262)",
        uses_ratio=True,
        baselines=("none", "group_mean"),
    )
    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio."


def reinforce_plus_plus(config: ReinforcePlusPlusConfig) -> Method:
    """(1 / sum_i |o_i|) sum_i sum_t min[ r A, clip(r) A ]."""
    return Method(clipped_ratio(config.eps, config.eps), "token_mean")
