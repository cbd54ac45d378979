"""Rewards (Algorithm 1, line 8): one row per output, with a status and the scores of its parts."""

from stages.reward.config import (
    AccuracyConfig,
    FormatConfig,
    FunctionConfig,
    LanguageConfig,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
)
from stages.reward.stage import STATUSES, score
from stages.reward.votes import count_votes

__all__ = [
    "STATUSES",
    "AccuracyConfig",
    "FormatConfig",
    "FunctionConfig",
    "LanguageConfig",
    "OverlongConfig",
    "RewardConfig",
    "StepsConfig",
    "count_votes",
    "score",
]
