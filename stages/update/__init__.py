"""Policy update (Algorithm 1, line 10): mu passes over one exploration stage, maximising an objective of the paradigm."""

from stages.update.config import MismatchLimits, NoCorrectionConfig, TruncatedCorrectionConfig, UpdateConfig
from stages.update.metrics import DIVERGENCE, MismatchError, check_mismatch, staleness_limit
from stages.update.objectives import (
    CISPOConfig,
    DAPOConfig,
    DataSource,
    DistillationConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    OnlineRFTConfig,
    PPOConfig,
    ReinforcePlusPlusConfig,
    RFTConfig,
    RLOOConfig,
    Row,
    SFTObjectiveConfig,
)
from stages.update.stage import update_policy

__all__ = [
    "DIVERGENCE",
    "CISPOConfig",
    "DAPOConfig",
    "DPOConfig",
    "DataSource",
    "DistillationConfig",
    "DrGRPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "MismatchError",
    "MismatchLimits",
    "NoCorrectionConfig",
    "ObjectiveConfig",
    "OnlineRFTConfig",
    "PPOConfig",
    "RFTConfig",
    "RLOOConfig",
    "ReinforcePlusPlusConfig",
    "Row",
    "SFTObjectiveConfig",
    "TruncatedCorrectionConfig",
    "UpdateConfig",
    "check_mismatch",
    "staleness_limit",
    "update_policy",
]
