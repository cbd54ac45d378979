"""Policy update (Algorithm 1, line 10): mu passes over one exploration stage, maximising the GRPO objective."""

from stages.update.config import GRPOConfig, UpdateConfig
from stages.update.stage import update_policy

__all__ = ["GRPOConfig", "UpdateConfig", "update_policy"]
