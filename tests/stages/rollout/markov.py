"""A policy whose next token depends on the last one only, with the chances that a test gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stages.models import Checkpoint, save
from stages.text.tokenizers import EOS, PAD, byte_symbols

Chances = Mapping[str, Mapping[str, float]]
"""For each token that of the next one; a token that is not named ends the output."""

_NEVER = -1e4


def symbols(text: str) -> str:
    """A token as a byte-level vocabulary spells it."""
    return "".join(byte_symbols()[byte] for byte in text.encode())


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    """Ids of tokens, each named by its text; `EOS` is the end of sequence."""
    return [tokenizer.convert_tokens_to_ids(token if token == EOS else symbols(token)) for token in tokens]


def markov_policy(chances: Chances, *, window: int = 64) -> tuple[Checkpoint, PreTrainedTokenizerFast]:
    """The policy and its tokenizer, whose tokens are those that `chances` names: of any length, across lines too.

    Every layer adds nothing, embeddings are one-hot and become sqrt(H) at one place in the norm, so that column i of the head
    times sqrt(H) is log P(. | i).
    """
    from transformers import Qwen2Tokenizer

    tokens = list(dict.fromkeys([*chances, *(each for row in chances.values() for each in row)]))
    vocabulary = {EOS: 0, PAD: 1} | {symbols(t): i for i, t in enumerate((t for t in tokens if t != EOS), start=2)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=EOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    width = len(vocabulary) + len(vocabulary) % 2
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=window, tie_word_embeddings=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.get_input_embeddings().weight.copy_(torch.eye(len(vocabulary), width))
        head = torch.full((len(vocabulary), width), _NEVER)
        for token in [EOS, PAD, *tokens]:
            place = 1 if token == PAD else ids_of(tokenizer, token)[0]
            for following, chance in chances.get(token, {EOS: 1.0}).items():
                head[ids_of(tokenizer, following)[0], place] = math.log(chance)
        model.lm_head.weight.copy_(head / math.sqrt(width))
    return Checkpoint.write(lambda folder: save(folder, model, tokenizer)), tokenizer
