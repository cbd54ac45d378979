"""Log-probabilities of the outputs under the policy and the reference: the KL part of a reward (DeepSeekMath, Eq. 2)."""

from stages.logprobs.config import LogprobsConfig
from stages.logprobs.stage import compare_policies

__all__ = ["LogprobsConfig", "compare_policies"]
