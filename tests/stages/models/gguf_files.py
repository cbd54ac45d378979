"""Tiny GGUF files, written by the library that defines the format, and the model that each describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stages.text.tokenizers import byte_symbols

HIDDEN, MIDDLE, HEADS, LAYERS, WINDOW = 16, 24, 2, 2, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = [*SPECIAL, *sorted(byte_symbols().values()), "th", "the"]
MERGES = ["t h", "th e"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a Llama of two layers by their names in GGUF, whose output head is the embedding."""
    draw = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (0.3 * draw.standard_normal(shape)).astype(np.float32)

    made = {"token_embd.weight": weight(len(TOKENS), HIDDEN), "output_norm.weight": 1 + weight(HIDDEN)}
    for layer in range(LAYERS):
        square = {name: weight(HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        mlp = {"ffn_gate": weight(MIDDLE, HIDDEN), "ffn_up": weight(MIDDLE, HIDDEN), "ffn_down": weight(HIDDEN, MIDDLE)}
        norms = {name: 1 + weight(HIDDEN) for name in ("attn_norm", "ffn_norm")}
        made |= {f"blk.{layer}.{name}.weight": value for name, value in (square | mlp | norms).items()}
    return made


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    rule: str = "smollm",
    more: dict[str, Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    tokens: list[str] | None = None,
    eos: int = 2,
    window: int = WINDOW,
) -> Path:
    """Write a model of two layers with a byte-level tokenizer.

    Args:
        rule: how text is split before the merges, `tokenizer.ggml.pre`.
        more: further metadata by key.
        eos: the token that ends an output.
    """
    file = gguf.GGUFWriter(path, architecture)
    file.add_context_length(window)
    file.add_embedding_length(HIDDEN)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(MIDDLE)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10_000.0)
    file.add_rope_dimension_count(HIDDEN // HEADS)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(rule)
    file.add_token_list(tokens or TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    file.add_token_types([control if token in SPECIAL else normal for token in tokens or TOKENS])
    file.add_token_merges(MERGES)
    file.add_bos_token_id(1)
    file.add_eos_token_id(eos)
    file.add_pad_token_id(0)
    file.add_unk_token_id(0)
    file.add_add_bos_token(False)
    file.add_chat_template(TEMPLATE)
    for key, value in (more or {}).items():
        add = {str: file.add_string, float: file.add_float32, bool: file.add_bool, int: file.add_uint32}[type(value)]
        add(key, value)
    for name, value in (weights or tensors()).items():
        file.add_tensor(name, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
