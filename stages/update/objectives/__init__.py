"""Objectives: each method one file, named after its row of the paper's Table 10 or its own paper.

A file holds a config class (what may be chosen, its defaults and its row) and a function from the config to a `Method`.
Adding one: a new file, its class in `ObjectiveConfig`, its arm in `method_of`; docs/adding-a-method.md does it once.
"""

from __future__ import annotations

from typing import Annotated, assert_never

from pydantic import Field

from stages.update.objectives.cispo import CISPOConfig, cispo
from stages.update.objectives.dapo import DAPOConfig, dapo
from stages.update.objectives.distillation import DistillationConfig, distillation
from stages.update.objectives.dpo import DPOConfig, dpo
from stages.update.objectives.dr_grpo import DrGRPOConfig, dr_grpo
from stages.update.objectives.grpo import GRPOConfig, grpo
from stages.update.objectives.gspo import GSPOConfig, gspo
from stages.update.objectives.likelihood import OnlineRFTConfig, RFTConfig, SFTObjectiveConfig, likelihood
from stages.update.objectives.method import DataSource, Level, Method, RewardSource, Row, Tokens
from stages.update.objectives.ppo import PPOConfig, ppo
from stages.update.objectives.reinforce_plus_plus import ReinforcePlusPlusConfig, reinforce_plus_plus
from stages.update.objectives.rloo import RLOOConfig, rloo

__all__ = [
    "CISPOConfig",
    "DAPOConfig",
    "DPOConfig",
    "DataSource",
    "DistillationConfig",
    "DrGRPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "Level",
    "Method",
    "ObjectiveConfig",
    "OnlineRFTConfig",
    "PPOConfig",
    "RFTConfig",
    "RLOOConfig",
    "ReinforcePlusPlusConfig",
    "RewardSource",
    "Row",
    "SFTObjectiveConfig",
    "Tokens",
    "method_of",
]

ObjectiveConfig = Annotated[
    SFTObjectiveConfig
    | RFTConfig
    | OnlineRFTConfig
    | DPOConfig
    | PPOConfig
    | GRPOConfig
    | DrGRPOConfig
    | DAPOConfig
    | GSPOConfig
    | CISPOConfig
    | RLOOConfig
    | DistillationConfig
    | ReinforcePlusPlusConfig,
    Field(discriminator="kind"),
]


def method_of(objective: ObjectiveConfig) -> Method:
    """Return what the training loop needs to know of the objective."""
    match objective:
        case SFTObjectiveConfig() | RFTConfig() | OnlineRFTConfig():
            return likelihood()
        case DPOConfig():
            return dpo(objective)
        case PPOConfig():
            return ppo(objective)
        case GRPOConfig():
            return grpo(objective)
        case DrGRPOConfig():
            return dr_grpo(objective)
        case DAPOConfig():
            return dapo(objective)
        case GSPOConfig():
            return gspo(objective)
        case CISPOConfig():
            return cispo(objective)
        case RLOOConfig():
            return rloo()
        case DistillationConfig():
            return distillation(objective)
        case ReinforcePlusPlusConfig():
            return reinforce_plus_plus(objective)
        case _ as unknown:
            assert_never(unknown)
