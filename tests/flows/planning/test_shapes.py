from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.planning.shapes import KNOWN_SHAPES, known_shape, read_shape, shape_of
from pipeline.config import ConfigError

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}


def test_the_parameters_of_deepseekmath_7b_add_up_by_hand() -> None:
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11_008 + 2 * 4096
    assert KNOWN_SHAPES["deepseek-math-7b"].parameters == 30 * layer + 2 * 102_400 * 4096 + 4096 == 6_910_365_696


def test_the_parameters_of_qwen_are_those_that_its_model_cards_round() -> None:
    """0.49 B and 1.54 B; biases of q, k and v, two key heads, a tied head."""
    small = 24 * (2 * 896 * (896 + 128) + 3 * 896 * 4864 + 896 + 2 * 128 + 2 * 896) + 896 + 151_936 * 896
    assert KNOWN_SHAPES["qwen2.5-0.5b"].parameters == small == 494_032_768
    assert KNOWN_SHAPES["qwen2.5-1.5b"].parameters == 1_543_714_304


def test_a_llama_with_biases_has_them_at_all_four_projections() -> None:
    plain = shape_of({**SMALL, "model_type": "llama"}, "plain")
    biased = shape_of({**SMALL, "model_type": "llama", "attention_bias": True}, "biased")
    assert biased.parameters - plain.parameters == 2 * (8 + 4 + 4 + 8)


def test_an_adapter_has_r_times_in_and_out_of_every_matrix_of_a_layer() -> None:
    shape = shape_of({**SMALL, "model_type": "llama"}, "small")
    matrices = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)]
    assert shape.adapter(3) == 2 * 3 * sum(inside + outside for inside, outside in matrices)


def test_a_description_without_its_fields_is_refused_and_says_which() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size \(found None\), vocab_size \(found '10'\)"):
        shape_of({**SMALL, "hidden_size": None, "vocab_size": "10"}, "config.json")


def test_a_model_type_with_other_formulas_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gpt2' is not one that"):
        shape_of({**SMALL, "model_type": "gpt2"}, "config.json")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_file_that_is_no_description_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_shape(tmp_path)


def test_a_folder_is_read_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "qwen2", "max_position_embeddings": 64}))
    shape = read_shape(tmp_path)
    assert (shape.head_size, shape.keys, shape.window, shape.qkv_bias) == (2, 4, 64, True)


def test_a_known_model_is_known_by_the_last_part_of_its_path() -> None:
    shape = known_shape("models/DeepSeek-Math-7B-Instruct/")
    assert shape is not None
    assert shape.layers == 30
    assert known_shape("some/other-7b") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("qwen3", {"head_dim": 6}),
    ],
)
def test_the_count_is_that_of_transformers_own_model(kind: str, more: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    description = AutoConfig.for_model(kind, **SMALL, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(description)
    assert shape_of(description.to_dict(), kind).parameters == model.num_parameters()
