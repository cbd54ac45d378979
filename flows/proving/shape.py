"""The model and the settings that are run: random weights, outputs of full length, a reward that any text may earn."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_CHARACTERS: Final = 127
_REWARDED: Final = r"[!-O]\Z"
"""What an output ends in that is rewarded: 47 of 127 characters."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A policy and how much of it is run."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    questions: int
    group: int
    tokens: int
    steps: int = 3
    """The first warms up and is not counted."""


SMALL: Final = Shape("small", 512, 64, 2, 2, 2, 128, questions=4, group=4, tokens=16)
HALF_BILLION: Final = Shape("0.5b", 151_936, 896, 24, 14, 2, 4864, questions=16, group=16, tokens=256)
"""Qwen2.5-0.5B's, 0.49 G parameters."""


def make_model(shape: Shape, folder: Path) -> None:
    """Write a Qwen2 with random weights as a Hugging Face folder. Its end of sequence is beyond the vocabulary: never drawn."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    characters = [chr(byte) if 33 <= byte < 127 else chr(256 + byte) for byte in range(_CHARACTERS)]  # GPT-2's table
    words = [f"{number}{'!z'[number % 2]}" for number in range(_CHARACTERS + 1, shape.vocabulary)]
    names = ["<|pad|>", *characters, *words]
    tokenizer = Qwen2Tokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(names),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=512 + shape.tokens,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def engines(vllm_python: Path | None) -> dict[str, dict[str, Any]]:
    """Return the settings of every engine that is installed, by name."""
    found: dict[str, dict[str, Any]] = {"hf, torch": {}}
    if importlib.util.find_spec("deepspeed"):
        found["hf, DeepSpeed ZeRO 2"] = {"update.training.engine": {"kind": "deepspeed", "zero_stage": 2}}
    if vllm_python or importlib.util.find_spec("vllm"):
        found["vLLM, torch"] = {"rollout.backend": {"kind": "vllm", "python": vllm_python and str(vllm_python)}}
    return found


def settings_of(shape: Shape, model: Path, engine: Mapping[str, Any], *, half: bool) -> dict[str, Any]:
    """Return the overrides of `arithmetic_smoke` that make a run of this shape; `half`: in bfloat16."""
    few = {"count": 2, "shortest": 2, "longest": 2}
    return {
        "name": "prove",
        "policy": {"kind": "pretrained", "path": str(model)},
        "sft": None,
        "data.train": {"count": 64, "shortest": 2, "longest": 4},
        "data.evaluation": {"held_out": few},
        "iterations": 1,
        "steps": shape.steps,
        "questions_per_step": shape.questions,
        "rollout.G": shape.group,
        "rollout.max_output_tokens": shape.tokens,
        "rollout.stop": False,
        "reward.truncated": "as_is",
        "reward.components": [{"kind": "format", "weight": 1.0, "form": "pattern", "pattern": _REWARDED}],
        "preflight": {"truncated": None, "unreadable": None, "without_signal": None},
        "evaluation": {"every": 0, "samples": 0, "estimates": {"ks": [1]}},
        "update.training.precision": "bf16" if half else "fp32",
        "update.training.optimizer": {"kind": "adamw", "learning_rate": 1e-5},
        "checkpoint.every": 1000,
        **engine,
    }
