"""Configuration of the critic."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.config import Config
from stages.training.config import AdamWConfig, TrainingConfig

__all__ = ["CriticConfig"]


class CriticConfig(Config):
    """How the value function is trained. The paper says no more than that PPO has one, and that it is costly (4.1.1)."""

    mu: int = Field(1, ge=1)
    """Passes over the outputs. Ours: as many as the policy makes (DeepSeekMath, 4.2)."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass: the policy's mini-batches, of the same questions; a run refuses another number than the
    policy's."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward; bounds memory and changes no result but in its last bits."""
    training: TrainingConfig = TrainingConfig(optimizer=AdamWConfig(learning_rate=1e-5))
    """Engine, optimizer, precision, learning rate. The paper gives none; 1e-5, ten times the policy's, is verl's."""

    @model_validator(mode="after")
    def _trained_in_full(self) -> Self:
        if self.training.adapter is not None:
            raise ValueError(
                "training.adapter: a critic learns a new head and is trained in full; set training.adapter to null"
            )
        return self
