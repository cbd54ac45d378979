"""Configuration of a first policy and of supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from pipeline.config import Config
from stages.models import require_buildable
from stages.text import CharacterTokenizerConfig, TokenizerConfig
from stages.training.config import MuonConfig, TrainingConfig

__all__ = ["PolicyConfig", "SFTConfig"]


class PolicyConfig(Config):
    """A causal language model with random weights."""

    kind: Literal["scratch"] = "scratch"
    """Discriminator beside policies that others trained."""
    architecture: str = "qwen2"
    """Model type as transformers names it: qwen2, llama, ..."""
    settings: dict[str, bool | int | float | str | None] = Field(
        default={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    )
    """Settings of that type which differ from its defaults. The vocabulary size and special tokens are the tokenizer's."""
    tokenizer: TokenizerConfig = CharacterTokenizerConfig()
    """Made from the demonstrations."""
    seed: NonNegativeInt = 0
    """Draws the weights."""

    @field_validator("settings")
    @classmethod
    def _buildable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        require_buildable(settings, "settings")
        return settings


class SFTConfig(Config):
    """Supervised fine-tuning: mean negative log-likelihood of completion tokens, EOS included (DeepSeekMath, Eq. 6)."""

    training: TrainingConfig = TrainingConfig(optimizer=MuonConfig(), precision="fp32", warmup_steps=40)
    """Engine, optimizer, precision and warm-up. One stage call is the whole training: it begins without moments and publishes
    none, which another objective follows, whatever `optimizer_state` says."""
    seed: NonNegativeInt = 0
    """Draws the order of the demonstrations; apart from the run's seed, so that runs with other seeds share this policy."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Which mean: over demonstrations of the mean over their tokens, (1/|o|) sum_t (DeepSeekMath, Eq. 6), or over all tokens of
    the batch, so that long demonstrations count for more (usual elsewhere). For lengths 2 and 6 a token weighs 1/4 and 1/12, or
    1/8 and 1/8. The loss that is charted and that `stop_loss` is held against is this mean, in nats per token."""
    batch_size: PositiveInt = 64
    """Demonstrations per update."""
    max_steps: PositiveInt = 2000
    """Updates before the decay begins, at most."""
    stop_loss: PositiveFloat | None = None
    """Begin the decay once the smoothed loss (nats per token) is below this; None: at max_steps only."""
    smoothing: float = Field(0.95, ge=0, lt=1)
    """Weight of the past in the smoothed loss, an exponential mean without the bias of its start."""
    decay_steps: NonNegativeInt = 0
    """Further updates, over which the learning rate falls linearly to 0."""
    length_pool: PositiveInt = 1
    """Batches that are drawn together and sorted by length before they are cut, then used in random order. 1: every batch
    is a plain random draw; more: less padding, batches of like length."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens per forward pass, padding included. Has no influence on the gradient but its last bits."""
