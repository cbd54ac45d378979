"""Log-probabilities of the outputs under fixed policies: for KL in a reward (DeepSeekMath, Eq. 2), or beside an update."""

from stages.logprobs.config import LogprobsConfig
from stages.logprobs.reference import score_reference
from stages.logprobs.stage import compare_policies

__all__ = ["LogprobsConfig", "compare_policies", "score_reference"]
