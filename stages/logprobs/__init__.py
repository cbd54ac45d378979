"""Log-probabilities of outputs under fixed policies."""

from stages.logprobs.stage import LogprobsConfig, compare_policies, score_reference

__all__ = ["LogprobsConfig", "compare_policies", "score_reference"]
