"""GSPO: importance ratio and clipping of whole outputs (Zheng et al. 2025, arXiv 2507.18071)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, Tokens

if TYPE_CHECKING:
    from stages.kernels.objective import Surrogate


class GSPOConfig(Config):
    """GSPO (its Eq. 5-7): s_i = (pi_theta(o_i) / pi_old(o_i))^(1/|o_i|) in place of the token's ratio.

    Computed as GSPO-token (its Eq. 13-14), which is GSPO where the tokens of an output have one advantage, and keeps the
    advantages of process supervision apart.
    """

    ROW: ClassVar = Row(
        "GSPO",
        ("policy",),
        "Rule",
        "A",
        ("group",),
        "its advantage is (r - mean) / std, and what it weighs are whole outputs (arXiv 2507.18071, Eq. 6-7)",
        uses_ratio=True,
        corrections=("sequence", "sequence_mean"),
    )
    kind: Literal["gspo"] = "gspo"
    "Selects this objective."
    eps_low: float = Field(3e-4, gt=0, lt=1)
    "Lower clip range; much smaller than GRPO's, since s_i averages over tokens (its section 5.1)."
    eps_high: float = Field(4e-4, gt=0)
    "Upper clip range (its section 5.1)."


def gspo(config: GSPOConfig) -> Method:
    """(1/G) sum_i (1/|o_i|) sum_t min[ s_{i,t} A_{i,t}, clip(s_{i,t}) A_{i,t} ]."""
    from stages.kernels.objective import sequence_clipped

    def surrogate(tokens: Tokens) -> Surrogate:
        return sequence_clipped(
            tokens.logp,
            tokens.old_logp,
            tokens.advantage,
            tokens.mask,
            eps_low=config.eps_low,
            eps_high=config.eps_high,
        )

    return Method(surrogate)
