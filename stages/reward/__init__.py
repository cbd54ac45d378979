"""Rewards (Algorithm 1, line 8): one row per output, with a status and the scores of its parts."""

from stages.reward.composition import answer_component, labels_only, outcome_components, unlearned_components
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
from stages.reward.stage import combine_rewards, score
from stages.reward.votes import count_votes
from stages.reward_metrics import STATUSES

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
    "combine_rewards",
    "count_votes",
    "labels_only",
    "outcome_components",
    "score",
    "unlearned_components",
]
