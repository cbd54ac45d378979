"""Where step labels come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Config

__all__ = ["MonteCarloConfig", "RuleStepsConfig", "StepLabelsConfig"]


class RuleStepsConfig(Config):
    """Step labels are the rules' step rewards: the built-in world's own checker, by a reward component of kind `steps`."""

    kind: Literal["rules"] = "rules"
    """Discriminator."""


class MonteCarloConfig(Config):
    """Step labels by completion (Math-Shepherd, Wang et al. 2023b, arXiv 2312.08935): a step is as good as what the policy
    makes of it. Needs the rules' verdict on whole outputs only, and so works for any questions."""

    kind: Literal["monte_carlo"] = "monte_carlo"
    """Discriminator."""
    samples: int = Field(8, ge=1)
    """N, continuations of each distinct prefix (Math-Shepherd: 8). The cost: with `rollout.G` outputs of K steps each, up to
    G * (K - 1) * N continuations of a question, less where outputs begin alike."""
    estimate: Literal["existence", "share"] = "existence"
    """Label of a step. `existence`: 1 if any of its continuations comes to the right answer, else 0 (Math-Shepherd's hard
    estimation). `share`: the share of those that do (soft estimation)."""
    outputs_per_question: int | None = Field(None, ge=1)
    """Only so many outputs of each question get step labels, those sampled first; null: all. The others stay examples of the
    outcome model."""


StepLabelsConfig = Annotated[RuleStepsConfig | MonteCarloConfig, Field(discriminator="kind")]
