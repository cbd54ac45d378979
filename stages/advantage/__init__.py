"""Advantages (Algorithm 1, line 9): what the gradient coefficient is made of, one value per output token."""

from stages.advantage.config import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
)
from stages.advantage.stage import estimate_advantages

__all__ = [
    "AdvantageConfig",
    "BatchConfig",
    "CorrectConfig",
    "GAEConfig",
    "GroupConfig",
    "OneConfig",
    "PairsConfig",
    "estimate_advantages",
]
