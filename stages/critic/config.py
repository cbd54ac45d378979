"""Configuration of the critic."""

from __future__ import annotations

from pydantic import Field

from pipeline.config import Config
from stages.training.config import AdamWConfig, TrainingConfig

__all__ = ["CriticConfig"]


class CriticConfig(Config):
    """How the value function is trained. The paper says no more than that PPO has one, and that it is costly (4.1.1)."""

    mu: int = Field(1, ge=1)
    """Passes over the outputs, one optimizer step each. Ours: as many as the policy makes (DeepSeekMath, 4.2)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward; bounds memory and changes no result but in its last bits."""
    training: TrainingConfig = TrainingConfig(optimizer=AdamWConfig(learning_rate=1e-5))
    """Engine, optimizer, precision, learning rate. The paper gives none; 1e-5, ten times the policy's, is verl's."""
