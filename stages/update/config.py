"""Configuration of the policy update."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Config
from stages.training.config import TrainingConfig

__all__ = ["GRPOConfig", "UpdateConfig"]


class GRPOConfig(Config):
    """GRPO (DeepSeekMath, Eq. 3 and 4): clipped ratio times group-relative advantage, KL to the reference in the loss.

    Table 10: data q ~ P_sft(Q), {o_i} ~ pi_theta(O|q); gradient coefficient A-hat + beta (pi_ref/pi_theta - 1) (Eq. 21).
    """

    kind: Literal["grpo"] = "grpo"
    "Selects this objective."
    eps: float = Field(0.2, gt=0, lt=1)
    "Clip range of the ratio. The paper gives no value; 0.2 is PPO's."
    beta: float = Field(0.04, ge=0)
    "KL coefficient (DeepSeekMath, 4.2). 0 needs no reference model, and rows of zero advantage then cost nothing."


class UpdateConfig(Config):
    """One exploration stage's updates."""

    objective: GRPOConfig = GRPOConfig()
    "What is maximised; a row of the paper's Table 10."
    mu: int = Field(1, ge=1)
    "Passes over the outputs (Algorithm 1, line 10). The paper: a single update per exploration stage (4.2)."
    mini_batches: int = Field(1, ge=1)
    "Optimizer steps per pass; questions are dealt to them at random, groups stay whole. 1 = the paper."
    micro_batch_tokens: int = Field(16384, ge=1)
    "Padded tokens per forward and backward; bounds memory. Gradients are accumulated with the batch's own denominator."
    merge_equal_outputs: bool = True
    "Compute equal outputs of a question once, weighted by their count: the same sum, up to rounding, for less work."
    training: TrainingConfig = TrainingConfig()
    "Engine, optimizer, precision, learning rate."
