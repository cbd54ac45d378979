"""The configuration of a run, which `cohort run` reads, overrides and passes to the flow."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from flows.config.combinations import unsupported_combinations
from flows.config.parts import (
    ArithmeticData,
    CurriculumConfig,
    EvaluationPlan,
    FileData,
    PreflightConfig,
    PretrainedPolicy,
    RewardModelPlan,
    RunSettings,
)

__all__ = [
    "ArithmeticData",
    "CurriculumConfig",
    "EvaluationPlan",
    "FileData",
    "IterativeRLConfig",
    "PreflightConfig",
    "PretrainedPolicy",
    "RewardModelPlan",
]


class IterativeRLConfig(RunSettings):
    """Algorithm 1: I iterations of M steps, from a policy made here or by others; GRPO, or another row of Table 10."""

    @model_validator(mode="after")
    def _only_supported_combinations(self) -> Self:
        if complaints := list(unsupported_combinations(self)):
            raise ValueError("\n    ".join(complaints))
        return self

    def looks_back_at(self, step: int) -> bool:
        """Return whether the policy after `step` is evaluated, a reference, or the last: it is always written."""
        return step % self.steps == 0 or self.evaluation.is_due(step, self.iterations * self.steps)

    @property
    def compares_policies(self) -> bool:
        """Whether advantages are made from log-probabilities of the policy and of a reference or teacher."""
        return self.advantage.kind == "teacher" or getattr(self.advantage, "kl_in_reward", 0.0) > 0

    @property
    def scores_outputs(self) -> bool:
        """Whether the outputs that are learned from get a reward."""
        return self.data_source != "demonstrations" and bool(self.update.objective.ROW.rewards)

    def identity(self) -> dict[str, Any]:
        """Return what makes it another run, as plain values: all but what stays on disk, and in which order it computes."""
        return self.model_dump(mode="json", exclude={"checkpoint", "keep", "side_by_side"})
