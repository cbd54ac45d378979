"""Text and ids: prompts, tokenizers, decoding and the steps of an output."""

from stages.text.chat_templates import PromptError
from stages.text.ids import decode_outputs, plain_of, step_ends
from stages.text.prompts import (
    Frame,
    PromptConfig,
    encode_completions,
    encode_prompt,
    encode_prompts,
    prompt_text,
    tool_frame,
    turn_end,
)
from stages.text.tokenizers import (
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    TokenizerConfig,
    build_tokenizer,
    require_faithful,
    settle_start,
    settle_tokenizer,
)

__all__ = [
    "BPETokenizerConfig",
    "CharacterTokenizerConfig",
    "Frame",
    "PromptConfig",
    "PromptError",
    "TokenizerConfig",
    "build_tokenizer",
    "decode_outputs",
    "encode_completions",
    "encode_prompt",
    "encode_prompts",
    "plain_of",
    "prompt_text",
    "require_faithful",
    "settle_start",
    "settle_tokenizer",
    "step_ends",
    "tool_frame",
    "turn_end",
]
