"""Reward models: made from a policy, trained on rule-labelled outputs, trained on as the policy moves (4.1.4)."""

from stages.reward_training.config import (
    BradleyTerryConfig,
    PointwiseConfig,
    ReplayConfig,
    RewardModelConfig,
    RewardObjectiveConfig,
    RewardTrainingConfig,
)
from stages.reward_training.creation import create_reward_model
from stages.reward_training.labelling import label_outputs
from stages.reward_training.replay import mix_with_history
from stages.reward_training.stage import train_reward_model

__all__ = [
    "BradleyTerryConfig",
    "PointwiseConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RewardObjectiveConfig",
    "RewardTrainingConfig",
    "create_reward_model",
    "label_outputs",
    "mix_with_history",
    "train_reward_model",
]
