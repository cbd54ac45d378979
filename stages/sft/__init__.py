"""Supervised fine-tuning, and the making of a first policy from scratch."""

from stages.sft.config import PolicyConfig, SFTConfig
from stages.sft.policy import create_policy
from stages.sft.stage import supervised_finetuning

__all__ = ["PolicyConfig", "SFTConfig", "create_policy", "supervised_finetuning"]
