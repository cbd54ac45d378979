"""CISPO: clipped importance weights, gradient for every token (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, Tokens

if TYPE_CHECKING:
    from stages.kernels.objective import Surrogate


class CISPOConfig(Config):
    """CISPO (its Eq. 4-5): sg[ min(r, 1 + eps_high) ] A log pi_theta, mean over all tokens, no KL term."""

    ROW: ClassVar = Row(
        "CISPO",
        ("policy",),
        "Rule",
        "min(r, 1 + eps) A",
        ("group",),
        "its advantage is GRPO's (arXiv 2506.13585, Eq. 1 and 4)",
        uses_ratio=True,
    )
    kind: Literal["cispo"] = "cispo"
    "Selects this objective."
    eps_high: float = Field(2.0, gt=0)
    "The weight's cap is 1 + eps_high. Its paper tunes it and gives no value; ours is loose."


def cispo(config: CISPOConfig) -> Method:
    """(1 / sum_i |o_i|) sum_i sum_t sg[ min(r, 1 + eps_high) ] A log pi_theta."""
    from stages.kernels.objective import clipped_weight

    def surrogate(tokens: Tokens) -> Surrogate:
        return clipped_weight(tokens.logp, tokens.old_logp, tokens.advantage, eps_high=config.eps_high)

    return Method(surrogate, "token_mean")
