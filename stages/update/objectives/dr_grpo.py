"""Dr. GRPO: GRPO without division by length and by standard deviation (Liu et al. 2025, arXiv 2503.20783)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, clipped_ratio


class DrGRPOConfig(Config):
    """Dr. GRPO: one divisor for all outputs, rewards centred but not scaled (`advantage.scale = none`), no KL term."""

    ROW: ClassVar = Row(
        "Dr. GRPO",
        ("policy",),
        "Rule",
        "r - mean(r)",
        ("group",),
        "dividing by the standard deviation is one of the two biases that it removes (arXiv 2503.20783, 3.1)",
        uses_ratio=True,
        scales=("none",),
    )
    kind: Literal["dr_grpo"] = "dr_grpo"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio (its section 3.2 keeps PPO's)."
    length: PositiveInt = 1024
    "L, the divisor of each output's sum: the longest output allowed, as in its code. DeepSeekMath's limit is 1024 (4.2)."


def dr_grpo(config: DrGRPOConfig) -> Method:
    """(1/G) sum_i (1/L) sum_t min[ r A, clip(r) A ]."""
    return Method(clipped_ratio(config.eps, config.eps), "constant", config.length)
