"""Scoring rows under a fixed model: by row, each distinct one computed once; and what a fixed model takes of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.store import Store
from stages.kernels.head import Float32Head
from stages.training import LoRAConfig, TrainingConfig
from stages.training.adapters import load_trainable
from stages.training.batching import Batch, Row
from stages.training.forward import completion_logprobs
from stages.training.loop import halve_linear_weights, on_device, reference_model, score_rows
from tests.stages.training.test_forward import BATCH, MODELS, model_of
from tests.stages.training.tiny import VOCABULARY, saved, tiny_checkpoint, tiny_model

ROWS = [Row([1, 2], [5, 6, 7]), Row([1, 2], [8]), Row([1, 2], [5, 6, 7]), Row([3], [8])]


def test_values_come_back_by_row_without_padding() -> None:
    found = score_rows(ROWS, 100, tiny_model(), lambda batch: batch.output_mask_BO * torch.arange(1.0, 4.0))
    assert found == [[1.0, 2.0, 3.0], [1.0], [1.0, 2.0, 3.0], [1.0]]


def test_equal_rows_are_computed_once_and_other_prompts_apart() -> None:
    computed: list[int] = []

    def score(batch: Batch) -> Tensor:
        computed.append(len(batch.rows))
        assert not torch.is_grad_enabled()
        return batch.output_mask_BO * batch.input_ids_BT[:, :1].float()  # the prompt's first token

    assert score_rows(ROWS, 5, tiny_model(), score) == [[1.0, 1.0, 1.0], [1.0], [1.0, 1.0, 1.0], [3.0]]
    assert sum(computed) == 3
    assert len(computed) > 1


def scored_in_bf16(model: Any) -> list[Tensor]:
    """All logits at once, and in chunks of five positions."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return [completion_logprobs(model, BATCH, 0.7, max_logits=most).logp_BO for most in (None, 5 * VOCABULARY)]


@pytest.mark.parametrize("name", [*MODELS, "qwen3"])
def test_halved_linear_weights_give_the_bits_of_float32_ones(name: str) -> None:
    architecture, settings, _ = MODELS.get(name, (name, {}, None))
    model = model_of(architecture, **settings).float()
    expected = scored_in_bf16(model)
    halve_linear_weights(model)
    assert all(found.equal(wanted) for found, wanted in zip(scored_in_bf16(model), expected, strict=True))
    halved = {key for key, weight in model.named_parameters() if weight.dtype == torch.bfloat16}
    assert {"k_proj", "v_proj"} <= {key.split(".")[-2] for key in halved}
    assert {key.split(".")[-1] for key in halved} == {"weight"}
    assert not any("norm" in key or "embed" in key for key in halved)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_as_precise_as_the_embedding(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    halve_linear_weights(model)
    assert model.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("adapter", [None, LoRAConfig(r=4)])
def test_a_reference_computes_what_masters_would_in_half_the_memory(store: Store, adapter: LoRAConfig | None) -> None:
    checkpoint = saved(model_of("llama", tie_word_embeddings=False).float())
    config = TrainingConfig(precision="bf16", adapter=adapter)
    masters = load_trainable(checkpoint, config, torch.float32)[0]
    kept = reference_model(checkpoint, config, "cpu")
    pairs = zip(scored_in_bf16(kept), scored_in_bf16(masters), strict=True)
    assert all(found.equal(expected) for found, expected in pairs)
    layers = (module for module in masters.modules() if type(module) in (torch.nn.Linear, Float32Head))
    linear = sum(layer.weight.numel() for layer in layers)
    sizes = [sum(weight.nbytes for weight in model.parameters()) for model in (masters, kept)]
    assert sizes[0] - sizes[1] == 2 * linear


def test_a_model_is_on_the_device_for_the_block_only(store: Store) -> None:
    model = reference_model(tiny_checkpoint(), TrainingConfig(), "cpu")
    tensors = [*model.parameters(), *model.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    with on_device(model, "meta"):
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert [tensor.data_ptr() for tensor in tensors] == places
