"""Rewards by learned models, and how far they can be trusted (DeepSeekMath, 4.1.2, 4.1.3)."""

from stages.reward_model.gauges import (
    GaugeConfig,
    GaugeLimits,
    RewardModelError,
    check_gauges,
    measure_reward_model,
)
from stages.reward_model.stage import ScoringConfig, score_outputs

__all__ = [
    "GaugeConfig",
    "GaugeLimits",
    "RewardModelError",
    "ScoringConfig",
    "check_gauges",
    "measure_reward_model",
    "score_outputs",
]
