"""The recipes for GPUs made tiny: which values change, and models of their architectures with random weights.

`SIZES` and the paths are all that tells a run in these tests from the recipe, and what decodes on a CPU. Objective, rewards,
replay, engines, ZeRO stage, precision, templates and learning rates are the recipe's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.config import IterativeRLConfig
from flows.config.recipes import RECIPES

if TYPE_CHECKING:
    import torch

DEEPSEEKMATH_7B: Final[dict[str, Any]] = {
    "steps": 2,  # 1,770
    "questions_per_step": 4,  # 16
    "rollout.G": 4,  # 64
    "rollout.max_output_tokens": 4,  # 1,024
    "update.training.engine.ranks": 2,  # 8, by nccl; here gloo
    "update.micro_batch_tokens": 512,  # 8,192: so that both ranks have a share
    "reward_model.questions": 8,  # 1,024
    "reward_model.training.training.engine.ranks": 2,  # 8
    "reward_model.training.questions_per_update": 4,  # 32
    "reward_model.training.micro_batch_tokens": 512,  # 8,192
    "reward_model.held_out_questions": 4,  # 128
    "evaluation.samples": 4,  # 64
    "evaluation.estimates.ks": (1, 4),  # to 64
}
GSM8K_ONE_GPU: Final[dict[str, Any]] = {
    "iterations": 2,  # 1
    "steps": 2,  # 232
    "questions_per_step": 4,  # 64
    "rollout.G": 4,  # 16
    "rollout.max_output_tokens": 4,  # 512
    "evaluation.every": 2,  # 58
    "evaluation.samples": 4,  # 8
    "evaluation.estimates.ks": (4,),  # 4, 8
}
QWEN: Final[dict[str, Any]] = {
    "steps": 2,  # 420, 282, 116
    "questions_per_step": 8,  # 256, 128, 64
    "rollout.G": 4,  # 5, 8, 16
    "rollout.max_output_tokens": 4,  # 1,024, 3,000, 1,024
    "evaluation.every": 2,  # 20, 16, 29
}
SIZES: Final = {
    "deepseekmath_7b": DEEPSEEKMATH_7B,
    "gsm8k_one_gpu": GSM8K_ONE_GPU,
    "gsm8k_tools": QWEN,
    "qwen_0_5b_gsm8k": QWEN,
    "qwen_1_5b_math": QWEN,
}
HF: Final[dict[str, Any]] = {"rollout.backend": {"kind": "hf", "dtype": "bfloat16"}}
"""Without vLLM."""
VLLM_ON_A_CPU: Final[dict[str, Any]] = {
    "rollout.backend.between_calls": "warm",  # sleep: its memory is the GPU's
    "rollout.backend.tensor_parallel_size": 1,  # 8
    "rollout.backend.max_num_seqs": 16,
    "rollout.backend.threads": 1,
    "rollout.backend.start_deadline": 400.0,
}
"""The recipe's own engine where there is no GPU; `rollout.backend.python` comes besides."""


def tiny(recipe: str, folder: Path, decoder: dict[str, Any] = HF) -> IterativeRLConfig:
    """A recipe at tiny size, with the model and the questions in `folder`."""
    config = RECIPES[recipe]()
    paths = {"data.path": str(folder), "policy.path": str(folder / "model")}
    if config.reward_model is not None:
        paths["reward_model.trunk.path"] = str(folder / "base")
    return config.override(SIZES[recipe] | decoder | paths)


# ------------------------------------------------------------------------------------- questions and models

_ANSWERS: Final = "123"
_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_CHATML: Final = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SMALL: Final = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Heads of 32 columns: vLLM's attention on a CPU knows no smaller ones."""


def write_questions(folder: Path) -> None:
    """Every set that the recipes name: sums whose answer is one digit."""
    names = {"train": "train", "gsm8k_train": "train", "gsm8k_test": "test", "math_test": "other"}
    names |= {"math_train": "train", "math500": "test"}
    for name, kind in names.items():
        asked = "problem" if name in ("math_train", "math500") else "question"
        rows = [
            {asked: f"What is {number} - {number - gold} ({kind})?", "solution": f"{gold}", "answer": f"{gold}"}
            for number in range(4, 14)
            for gold in map(int, _ANSWERS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_deepseekmath(folder: Path, seed: int = 0) -> None:
    """A model with the configuration of deepseek-math-7b but for its sizes, and the tokenizer files as its folder has them."""
    from tests.stages.models.test_architectures import CASES
    from tests.stages.text.test_tokenizers import byte_level

    backend = byte_level()
    settings = {**CASES["deepseek-math-7b"].settings, **_SMALL, "num_key_value_heads": 2}
    settings |= {"vocab_size": backend.get_vocab_size()}
    end = backend.token_to_id(_EOS)
    digits = [backend.token_to_id(digit) for digit in _ANSWERS]
    _write_model(folder, "llama", settings, ends=[end], digits=digits, seed=seed)
    backend.save(str(folder / "tokenizer.json"))
    said = {"add_bos_token": True, "add_eos_token": False, "bos_token": _BOS, "eos_token": _EOS, "pad_token": _EOS}
    said |= {"unk_token": None, "legacy": True, "model_max_length": 4096, "tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def write_qwen(folder: Path) -> None:
    """A model as Qwen2.5-0.5B-Instruct's folder: tied embeddings, ChatML, two ends, and a vocabulary above the tokenizer's."""
    from stages.text import BPETokenizerConfig, build_tokenizer

    tokenizer = build_tokenizer(["the answer is 42"] * 4, BPETokenizerConfig(vocab_size=300))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", _CHATML
    settings = {"vocab_size": len(tokenizer) + 7, "num_key_value_heads": 1, "max_position_embeddings": 512, **_SMALL}
    settings |= {"tie_word_embeddings": True, "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False}
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    _write_model(folder, "qwen2", settings, ends=ends, digits=tokenizer.convert_tokens_to_ids([*_ANSWERS]))
    tokenizer.save_pretrained(folder)


def _write_model(
    folder: Path, model_type: str, settings: dict[str, Any], *, ends: list[int], digits: list[int], seed: int = 0
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    description = AutoConfig.for_model(model_type, **settings)
    description.bos_token_id, description.eos_token_id, description.pad_token_id = None, ends[0], None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(description)
        with torch.no_grad():
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                _lean_to_digits(weight, ends[0], digits)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.to(torch.bfloat16).save_pretrained(folder)


def _lean_to_digits(weight_VH: torch.Tensor, end: int, digits: list[int]) -> None:
    """Make a digit the likely first token and the end a likely next one, so that some answers are right and rewards differ.

    Two columns do it: after any token the first is on, and it favours digits; after a digit the second is, and favours the end.
    """
    weight_VH.normal_(std=0.2)
    weight_VH[:, 0], weight_VH[:, 1] = 1.0, 0.0
    weight_VH[digits, 0], weight_VH[digits, 1] = 4.0, 2.0
    weight_VH[end, 1] = 10.0
