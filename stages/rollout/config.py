"""How outputs are sampled, and by what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pipeline.config import Config

__all__ = ["HFBackendConfig", "RolloutConfig"]


class HFBackendConfig(Config):
    """Our own decoding loop over a transformers model, in this process; any architecture with full attention."""

    kind: Literal["hf"] = "hf"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and keys. `auto`: bfloat16 on a GPU and on a CPU that multiplies it in hardware, else float32
    (bfloat16 is emulated there, many times slower). Logits become float32 before temperature and softmax in any case."""
    attention: Literal["grouped", "eager", "sdpa"] = "grouped"
    """`grouped`: ours, eager attention that reads keys shared by several query heads once; refuses models with soft caps or
    sinks. Else an implementation of transformers."""
    batch_rows: PositiveInt = 512
    """Outputs decoded side by side, at most: bounds the memory of keys and values. Other values change last bits only."""
    threads: PositiveInt | None = None
    """Torch threads on a CPU (None: torch's default). They change the order of sums, and so the last bits."""


class RolloutConfig(Config):
    """Exploration: G outputs for every question, at temperature T."""

    G: PositiveInt = 64
    """Outputs per question (DeepSeekMath, section 4.2: 64)."""
    temperature: NonNegativeFloat = 1.0
    """T of softmax(logits / T); the paper gives none. 0 takes the most probable token, and then G must be 1."""
    top_p: float = 1.0
    """Only 1, for now: log-probabilities of a truncated distribution need its kept mass in every ratio of the update."""
    max_output_tokens: PositiveInt = 1024
    """Outputs end here at the latest (DeepSeekMath, section 4.2: 1024), with finish reason `length`."""
    stop: bool = True
    """End outputs at the end-of-sequence tokens. False forces every output to `max_output_tokens`: for benchmarks."""
    backend: HFBackendConfig = Field(default_factory=HFBackendConfig)
    """What decodes."""

    @model_validator(mode="after")
    def _is_one_distribution(self) -> Self:
        if self.top_p != 1:
            raise ValueError(f"expected top_p = 1 (sampling from the whole distribution), found {self.top_p}")
        if self.temperature == 0 and self.G != 1:
            raise ValueError(f"temperature 0 gives G = {self.G} equal outputs; set G = 1, or a temperature above 0")
        return self
