"""The learning rate of an update as a factor of the configured one."""

from __future__ import annotations

from typing import assert_never

from stages.training.config import TrainingConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(updates: int, config: TrainingConfig) -> float:
    """Factor for the update that follows `updates` applied ones: linear warm-up, then the schedule.

    Counted in optimizer updates, never in micro-batches; skipped updates do not count.
    """
    if updates < config.warmup_steps:
        return (updates + 1) / config.warmup_steps
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            assert config.total_steps is not None  # the config demands it
            return max(0.0, (config.total_steps - updates) / (config.total_steps - config.warmup_steps))
        case _ as unknown:
            assert_never(unknown)
