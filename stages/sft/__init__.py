"""Supervised fine-tuning, demonstrations in the place of outputs, and the making of a first policy from scratch."""

from stages.sft.config import PolicyConfig, SFTConfig
from stages.sft.demonstrations import demonstrated_outputs
from stages.sft.policy import create_policy, policy_texts
from stages.sft.stage import supervised_finetuning

__all__ = [
    "PolicyConfig",
    "SFTConfig",
    "create_policy",
    "demonstrated_outputs",
    "policy_texts",
    "supervised_finetuning",
]
