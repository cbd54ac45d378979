"""DAPO: decoupled clipping and a mean over tokens (Yu et al. 2025, arXiv 2503.14476)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, clipped_ratio


class DAPOConfig(Config):
    """DAPO (its Eq. 8): clip-higher, token-level mean, no KL term.

    Its other two parts are elsewhere: dynamic sampling in the flow (`dynamic_sampling`), overlong shaping among the rewards
    (component `overlong`).
    """

    ROW: ClassVar = Row(
        "DAPO",
        ("policy",),
        "Rule",
        "A",
        ("group",),
        "its advantage is (r - mean) / std (arXiv 2503.14476, Eq. 9)",
        uses_ratio=True,
    )
    kind: Literal["dapo"] = "dapo"
    "Selects this objective."
    eps_low: float = Field(0.2, gt=0, lt=1)
    "Lower clip range (its section 4.1)."
    eps_high: float = Field(0.28, gt=0)
    "Upper clip range, wider so that unlikely tokens may grow (its section 3.1 and 4.1)."


def dapo(config: DAPOConfig) -> Method:
    """(1 / sum_i |o_i|) sum_i sum_t min[ r A, clip(r, 1 - eps_low, 1 + eps_high) A ]."""
    return Method(clipped_ratio(config.eps_low, config.eps_high), "token_mean")
