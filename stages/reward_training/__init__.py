"""Reward models: made from a policy, trained on rule-labelled outputs, trained on as the policy moves (4.1.4)."""

from stages.reward_training.examples import (
    BradleyTerryConfig,
    PointwiseConfig,
    RewardObjectiveConfig,
    nothing_to_learn,
)
from stages.reward_training.labels import (
    MonteCarloConfig,
    RuleStepsConfig,
    StepLabelsConfig,
    estimate_step_labels,
    label_outputs,
)
from stages.reward_training.stage import (
    ReplayConfig,
    RewardModelConfig,
    RewardTrainingConfig,
    create_reward_model,
    mix_with_history,
    train_reward_model,
)

__all__ = [
    "BradleyTerryConfig",
    "MonteCarloConfig",
    "PointwiseConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RewardObjectiveConfig",
    "RewardTrainingConfig",
    "RuleStepsConfig",
    "StepLabelsConfig",
    "create_reward_model",
    "estimate_step_labels",
    "label_outputs",
    "mix_with_history",
    "nothing_to_learn",
    "train_reward_model",
]
