"""Tiny Qwen2 policies with random weights, and questions for them."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stages.models import Checkpoint, save
from stages.tables import Questions
from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer
from tests.stages.rows import question_rows
from tests.stages.training.tiny import changed

SECOND_STOP = 3
"""An id that ends outputs besides the tokenizer's end of sequence."""


def tiny_policy(
    weights: int,
    *,
    window: int = 64,
    head: int = 32,
    spread: float = 0.3,
    padded: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Checkpoint:
    """Random weights by seed; the embedding is also the output head.

    Args:
        head: its size; 32 is the least that vLLM's attention has on a CPU.
        spread: standard deviation of the weights; 0 makes every token equally likely.
        padded: rows of the embedding behind the tokenizer's last id, as other models have them.
        tokenizer: other than one of a token for each of 15 characters.
    """
    torch.manual_seed(weights)
    tokenizer = tokenizer or build_tokenizer(["0123456789+-=.\n"], CharacterTokenizerConfig())
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer) + padded, hidden_size=2 * head, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=window, tie_word_embeddings=True,
            pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=spread)
    ends = [tokenizer.eos_token_id, SECOND_STOP]
    return Checkpoint.write(lambda folder: save(folder, model, tokenizer, eos_token_ids=ends))


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and some merges, one of them across the border of a character."""
    return build_tokenizer(["```python\n1+2\n```\n", "加加加 12 12"], BPETokenizerConfig(vocab_size=300))


def far_from_zero() -> Checkpoint:
    """One whose logits lie around 20, as those of trained models do, and differ by few units."""

    def shift(weights: dict[str, torch.Tensor]) -> None:
        embedding = weights["model.embed_tokens.weight"].mul_(0.4)
        embedding[:, 0] = 3.0
        for name, weight in weights.items():
            weight *= 0.02 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0

    return changed(tiny_policy(3, head=32), shift)


def uniform_policy() -> Checkpoint:
    """One without any preference: its logits are all zero."""
    return tiny_policy(0, spread=0.0)


def questions(*texts: str) -> Questions:
    """Named q0, q1, ..."""
    return Questions.write(question_rows(*texts))
