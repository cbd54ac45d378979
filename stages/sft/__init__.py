"""Supervised fine-tuning, demonstrations as outputs, and a first policy from scratch."""

from stages.sft.policy import PolicyConfig, create_policy, policy_texts
from stages.sft.stage import SFTConfig, demonstrated_outputs, supervised_finetuning

__all__ = [
    "PolicyConfig",
    "SFTConfig",
    "create_policy",
    "demonstrated_outputs",
    "policy_texts",
    "supervised_finetuning",
]
