"""Configuration of scoring by reward models, and of what their scores are held against."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from pipeline.config import Config

__all__ = ["GaugeConfig", "GaugeLimits", "ScoringConfig"]


class ScoringConfig(Config):
    """How a reward model's scores become rewards."""

    scale: Literal["logit", "sigmoid"] = "logit"
    """`logit`: the model's output as it is; `sigmoid`: squeezed into 0..1, a probability where the model was trained pointwise
    (Math-Shepherd's scale). The paper is silent. A group's normalisation removes level and scale, not this curvature; rewards
    that are mixed with rules belong on `sigmoid`."""
    process_score: Literal["min", "mean", "last"] = "min"
    """The score of an output that only a process model has scored, from those of its steps. `min`: Math-Shepherd's (3.4)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward; bounds memory and changes no result but in its last bits."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the trunk's matrix products; parameters and the head are float32 in both. On a CPU without bfloat16
    instructions fp32 is far faster (`training.native_bf16`)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "eager"
    """Attention implementation."""
    threads: PositiveInt | None = None
    """Torch threads on a CPU (None: torch's default)."""


class GaugeConfig(Config):
    """How gauges are estimated."""

    resamples: int = Field(1000, ge=100)
    """Resamples of the questions for 95 % intervals."""
    seed: int = 0
    """Seed of the resampling; it decides the third digit of the bounds."""
    bins: int = Field(10, ge=2)
    """Bins of equal width for the calibration error."""


class GaugeLimits(Config):
    """Where a run shall stop because its rewards no longer stand for being right; null: never."""

    min_auc: float | None = Field(None, ge=0, le=1)
    """Least AUC of the reward model on the current policy's outputs. Ours; 0.5 is chance."""
    min_correlation: float | None = Field(None, ge=-1, le=1)
    """Least Pearson correlation of model reward and rule reward. Ours. It falls when the policy learns to please the model
    instead of being right (reward hacking)."""
    max_length_bias: float | None = Field(None, ge=0, le=2)
    """Most that the rank correlation of score and length may lie away from that of rule reward and length. Ours."""
