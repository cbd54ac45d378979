"""Rewards (Algorithm 1, line 8): one row per output, with a status and the scores of its parts."""

from stages.reward.composition import answer_component, beside_labels, beside_steps, labels_only
from stages.reward.config import (
    AccuracyConfig,
    FormatConfig,
    FunctionConfig,
    LanguageConfig,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
    ThinkingConfig,
)
from stages.reward.stage import STATUSES, combine_rewards, score
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
    "ThinkingConfig",
    "answer_component",
    "beside_labels",
    "beside_steps",
    "combine_rewards",
    "count_votes",
    "labels_only",
    "score",
]
