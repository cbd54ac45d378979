"""Evaluation: how often a policy is right, once, at least once in K (Pass@K), and by majority of K (Maj@K)."""

from stages.evaluation.stage import EvaluationConfig, evaluate

__all__ = ["EvaluationConfig", "evaluate"]
