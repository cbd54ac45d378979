"""Configuration of reward models and of their training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config
from stages.training.config import AdamWConfig, TrainingConfig

__all__ = [
    "BradleyTerryConfig",
    "MonteCarloConfig",
    "PointwiseConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RewardObjectiveConfig",
    "RewardTrainingConfig",
    "RuleStepsConfig",
    "StepLabelsConfig",
]


class RewardModelConfig(Config):
    """Which kind of reward model is made."""

    kind: Literal["outcome", "process"] = "outcome"
    """`outcome`: one score for an output (sequence classifier; DeepSeekMath, 4.1.2). `process`: one for each step (token
    classifier read at step ends; 4.1.3)."""


class BradleyTerryConfig(Config):
    """-log sigma(s+ - s-) of pairs of a right and a wrong output of one question; outcome models only.

    Fits differences within a question, which is all that a group's advantages use; the level of the scores means nothing.
    """

    kind: Literal["bradley_terry"] = "bradley_terry"
    """Discriminator."""
    pairs: Literal["all", "matched"] = "all"
    """`all`: every right output with every wrong one of its question (after Ouyang et al. 2022, 3.5), computed together: G
    outputs must fit into memory at once. `matched`: the i-th right with the i-th wrong, each used once, in micro-batches of
    any size; what has no counterpart is not learned from."""
    average: Literal["questions", "pairs"] = "questions"
    """`questions`: mean over questions of the mean over their pairs: the 1 / (K choose 2) of Ouyang et al. 2022, Eq. 1, which
    ranks K outputs of a prompt. Ours have R (K - R) pairs, R outputs being right. `pairs`: mean over all pairs of the update,
    which weighs a question with half its outputs right (K / 2)^2 / (K - 1) times one with a single right output."""


class PointwiseConfig(Config):
    """Binary cross-entropy of each score with its label, mean over outputs; of a process model mean over outputs of the mean
    over their steps. sigma(score) estimates the chance of being right (Math-Shepherd, Eq. 1 and 2)."""

    kind: Literal["pointwise"] = "pointwise"
    """Discriminator."""


RewardObjectiveConfig = Annotated[BradleyTerryConfig | PointwiseConfig, Field(discriminator="kind")]


class RewardTrainingConfig(Config):
    """How a reward model is trained. The paper gives the learning rate and no more."""

    objective: RewardObjectiveConfig = PointwiseConfig()
    """What is minimised. The paper's source, Math-Shepherd, fits labels one by one; so do we unless told otherwise."""
    epochs: int = Field(1, ge=1)
    """Passes over the questions. Ours: one, since reward models overfit soon (Ouyang et al. 2022, C.2)."""
    questions_per_update: int = Field(32, ge=1)
    """Questions whose labelled outputs, all of them, make one optimizer step; so a question's pairs stay together. Ours."""
    decay: Literal["linear", "none"] = "linear"
    """The learning rate within one training: from the configured one to 0 over its updates, or constant; every training
    begins at the full rate again, where `training.schedule` counts on from one to the next. Ours: the paper gives one rate;
    on the built-in world the held-out AUC was 0.95 and 0.99 (two seeds) with decay, 0.85 (one seed) without."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward; bounds memory and changes no result but in its last bits. A unit that is
    learned from as a whole (with `pairs: all` the outputs of a question) may exceed it."""
    training: TrainingConfig = TrainingConfig(optimizer=AdamWConfig(learning_rate=2e-5))
    """Engine, optimizer, precision; DeepSeekMath, 4.2: 2e-5. `optimizer_state` says whether the next training of the same
    model continues with the moments of this one or begins anew."""

    @model_validator(mode="after")
    def _trained_in_full(self) -> Self:
        if self.training.adapter is not None:
            raise ValueError(
                "training.adapter: a reward model learns a new head and is trained in full; set training.adapter to null"
            )
        return self


class ReplayConfig(Config):
    """How much history joins fresh labels (DeepSeekMath, 4.1.4: "a replay mechanism that incorporates 10% of historical
    data")."""

    share: float = Field(0.1, ge=0, lt=1)
    """4.1.4: 10 %."""
    share_of: Literal["training_set", "old_pool"] = "training_set"
    """What it is a share of; the paper leaves it open. `training_set`: of the mixture, n = share / (1 - share) * fresh rows, so
    that old and new stand in one proportion at every iteration. `old_pool`: of the history, n = share * its rows, which grows
    from iteration to iteration."""

    @model_validator(mode="after")
    def _shares_something(self) -> Self:
        if self.share == 0 and self.share_of != "training_set":
            raise ValueError(
                f"share_of: a share of 0 is nothing of either; expected training_set, found {self.share_of}"
            )
        return self


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
