"""Configuration of scoring outputs under fixed policies."""

from __future__ import annotations

from pydantic import Field

from pipeline.config import Config
from stages.training.config import TrainingConfig

__all__ = ["LogprobsConfig"]


class LogprobsConfig(Config):
    """How outputs are scored under policy and reference, or the reference alone."""

    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward; bounds memory and changes no result but in its last bits."""
    training: TrainingConfig = TrainingConfig()
    """The policy update's own: with equal settings the policy is scored by the engine that trains it, loaded once."""
