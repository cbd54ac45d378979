"""Advantages (Algorithm 1, line 9): what the gradient coefficient is made of, one value per output token."""

from stages.advantage.config import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    TeacherConfig,
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
    "TeacherConfig",
    "estimate_advantages",
]
