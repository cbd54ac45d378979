"""GRPO, the paper's method (DeepSeekMath, Eq. 3, 4 and 21)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config import Config
from stages.update.objectives.method import Aggregation, Divergence, Method, Row, clipped_ratio


class GRPOConfig(Config):
    """GRPO (DeepSeekMath, Eq. 3 and 4): clipped ratio times group-relative advantage, KL to the reference in the loss."""

    ROW: ClassVar = Row(
        "GRPO",
        ("policy", "initial_policy"),
        "Model",
        "A + beta (pi_ref/pi_theta - 1)",
        ("group", "batch"),
        "Eq. 3 takes any advantage of a reward, of outputs that a policy sampled",
        uses_ratio=True,
        baselines=("mean", "leave_one_out", "none", "group_mean"),
        scales=("std", "none"),
    )
    kind: Literal["grpo"] = "grpo"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio. The paper gives no value; 0.2 is PPO's."
    beta: float = Field(0.04, ge=0)
    "KL coefficient (DeepSeekMath, 4.2). 0 needs no reference model, and rows of zero advantage then cost nothing."
    divergence: Divergence = "k3"
    "Estimator of the KL term, inside the per-token braces; k3 is Eq. 4. `k2` and `k3_unbiased` descend the reverse KL."
    aggregation: Aggregation = "sequence_mean"
    "Eq. 3: mean over outputs of the mean over their tokens. `token_mean`: all tokens alike. `constant`: sum / `length`."
    length: PositiveInt | None = None
    "L of the aggregation `constant`, and only there: the longest output allowed is the usual choice."

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.divergence == "k1" and self.beta > 0:
            raise ValueError(
                "divergence k1 as a loss has gradient 0 in expectation; take k3 (the paper) or k3_unbiased"
            )
        if self.divergence != "k3" and self.beta == 0:
            raise ValueError(
                f"divergence {self.divergence} has no effect where beta is 0: there is no KL term; set beta above 0, or leave "
                "divergence at k3"
            )
        if (self.aggregation == "constant") != (self.length is not None):
            raise ValueError("aggregation constant and `length` belong together: set both or neither")
        return self


def grpo(config: GRPOConfig) -> Method:
    """min[ r A, clip(r, 1 - eps, 1 + eps) A ] - beta D_KL."""
    return Method(
        clipped_ratio(config.eps, config.eps), config.aggregation, config.length or 1, config.beta, config.divergence
    )
