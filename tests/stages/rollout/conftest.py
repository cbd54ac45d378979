"""Tiny models with random weights, spread so that their distributions are neither flat nor certain."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 23


def make_model(architecture: str, *, spread: float = 0.4, attention: str = "eager") -> PreTrainedModel:
    """Two layers of 16; `spread` is the standard deviation of the weights: larger makes sharper distributions."""
    torch.manual_seed(5)
    special = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
    match architecture:
        case "qwen2":  # fewer key heads than query heads
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**special, **shape, **heads))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**special, **shape, num_attention_heads=2))
        case _:  # learned positions
            model = GPT2LMHeadModel(GPT2Config(**special, n_embd=16, n_layer=2, n_head=2, n_positions=128))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=spread)
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.fixture(scope="session")
def qwen2() -> PreTrainedModel:
    return make_model("qwen2")


@pytest.fixture(scope="session", params=["qwen2", "llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)
