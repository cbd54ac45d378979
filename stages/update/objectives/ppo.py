"""PPO with a learned value function (DeepSeekMath, Eq. 1, 2 and 18)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, clipped_ratio


class PPOConfig(Config):
    """PPO (DeepSeekMath, Eq. 1): clipped ratio times the advantage of a critic; the KL penalty is in the reward (Eq. 2).

    The critic's values, the penalty and generalised advantage estimation are the advantage's (`advantage.kind = gae`).
    """

    ROW: ClassVar = Row(
        "PPO",
        ("policy",),
        "Model",
        "A_t (GAE)",
        ("gae",),
        "its advantage is a critic's (DeepSeekMath, Eq. 18)",
        uses_ratio=True,
    )
    kind: Literal["ppo"] = "ppo"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio (Schulman et al. 2017); the paper gives no value."


def ppo(config: PPOConfig) -> Method:
    """min[ r A, clip(r, 1 - eps, 1 + eps) A ], and no KL term: it is in A."""
    return Method(clipped_ratio(config.eps, config.eps))
