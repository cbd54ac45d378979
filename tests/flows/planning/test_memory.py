from __future__ import annotations

from dataclasses import replace

import pytest

from flows.planning.memory import (
    Batch,
    hf_memory,
    kept_by_layer,
    room_of_keys,
    scoring_memory,
    side_by_side,
    token_bytes,
    training_memory,
    training_state,
    vllm_memory,
)
from stages.rollout import HFBackendConfig, VLLMBackendConfig
from stages.rollout.kv_cache import RowCache
from stages.training import TrainingConfig
from tests.flows.planning.conftest import SEVEN_B, SHAPE, config


def zero(stage: int, ranks: int, offload: str = "none") -> TrainingConfig:
    return config(engine={"kind": "deepspeed", "zero_stage": stage, "ranks": ranks, "offload": offload})


def test_adamw_has_sixteen_bytes_a_parameter() -> None:
    assert training_state(1000, SHAPE, config(), 1000) == {"weights": 4000, "gradients": 4000, "optimizer": 8000}


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 4000, 4000, 3000), (2, 4000, 1000, 3000), (3, 1000, 1000, 3000)],
)
def test_zero_shares_out_more_with_every_stage(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    """Over four ranks; the optimizer has masters of its own: twelve bytes a parameter."""
    state = training_state(1000, SHAPE, zero(stage, 4), 1000)
    assert state == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def test_what_is_offloaded_is_not_on_the_device() -> None:
    assert training_state(1000, SHAPE, zero(2, 2, "optimizer"), 1000)["optimizer"] == 0
    assert training_state(1000, SHAPE, zero(3, 2, "parameters"), 1000)["weights"] == 0


def test_an_adapter_has_gradients_and_moments_of_its_own_size_alone() -> None:
    state = training_state(1010, SHAPE, config(adapter={"r": 1}), 10)
    assert state == {"weights": 4040, "gradients": 40, "optimizer": 80}


def test_a_layer_keeps_what_its_operations_save() -> None:
    """Two rows of four tokens: 8 tokens of 12 + 8 + 12 numbers, and 32 attention weights."""
    batch = Batch(2, 1, 3)
    assert kept_by_layer(SHAPE, batch, "fp32", "sdpa") == 8 * 32 * 4
    assert kept_by_layer(SHAPE, batch, "fp32", "eager") == 8 * 32 * 4 + 32 * 4
    assert kept_by_layer(SHAPE, batch, "bf16", "eager") == 8 * (26 * 2 + 8 * 2 + 8 * 3) + 32 * 6
    # Behind one prompt: 7 tokens, two keys more of 4 numbers, and 1 + 2 x 3 x 4 weights.
    shared = Batch(2, 1, 3, group=2)
    assert kept_by_layer(SHAPE, shared, "fp32", "eager") == (7 * 32 + 2 * 4 + 25) * 4


def test_a_budget_makes_micro_batches_of_whole_rows() -> None:
    assert Batch.of(10, 3, 5, 20) == Batch(2, 3, 5, several=True)
    assert Batch.of(2, 3, 5, 20) == Batch(2, 3, 5, several=False)
    # Two groups of 3 + 4 x (5 + 8 / 4); then a third prompt with two outputs in the 17 that are left.
    assert Batch.of(20, 3, 5, 79, group=4) == Batch(10, 3, 5, several=True, group=4)
    assert (Batch.of(20, 3, 5, 79, group=4).prompts, Batch.of(20, 3, 5, 79, group=4).tokens) == (3, 59)
    assert Batch.of(20, 3, 5, 71, group=4).rows == 8  # nine are left, and a prompt with an output takes ten
    assert Batch.of(10, 30, 50, 20) == Batch(
        1, 30, 50, several=True
    )  # a row longer than the budget is a batch of its own


def test_recomputing_keeps_one_hidden_state_a_layer_and_token() -> None:
    shape, batch = replace(SEVEN_B, vocabulary=1000), Batch(4, 128, 384, several=True)
    every, inputs = (
        training_memory(shape, config(activation_checkpointing=again, attention="sdpa"), batch)
        for again in (False, True)
    )
    layer, passing = kept_by_layer(shape, batch, "fp32", "sdpa"), 2 * 4 * 2048 * 11_008
    assert every["activations"] == 30 * layer + passing
    # One layer is computed again when the logits are gone, and takes their place.
    assert inputs["activations"] == 30 * 2048 * 4096 * 4 + layer + passing - inputs["logits"]


def test_logits_beyond_their_limit_are_held_a_chunk_at_a_time() -> None:
    batch = Batch(4, 128, 384, several=True)
    chunked = training_memory(SEVEN_B, config(attention="sdpa"), batch)["logits"]
    whole = training_memory(SEVEN_B, config(attention="sdpa", max_logits=None), batch)["logits"]
    assert chunked == 2 * 4 * (1 << 25) + 4 * 102_400 * 4096
    assert whole == 2 * 4 * 1536 * 102_400 + 2 * 4 * (1 << 22)
    rounded = config(attention="sdpa", max_logits=None, precision="bf16", head_precision="as_computed")
    assert training_memory(SEVEN_B, rounded, batch)["logits"] == 2 * 2 * 1536 * 102_400 + 2 * 4 * (1 << 22)
    exact = config(attention="sdpa", max_logits=None, precision="bf16")
    assert training_memory(SEVEN_B, exact, batch)["logits"] == whole
    how = {"precision": "bf16", "attention": "sdpa", "max_logits": None}
    for half, size in ((True, 2), (False, 4)):
        logits = scoring_memory(SEVEN_B, batch, half=half, **how)["logits"]
        assert logits == size * 1536 * 102_400 + 2 * 4 * (1 << 22)


def test_a_reference_in_memory_is_four_bytes_a_parameter() -> None:
    batch = Batch(1, 10, 10)
    without, with_it = (training_memory(SEVEN_B, config(), batch, reference=there) for there in (False, True))
    assert sum(with_it.values()) - sum(without.values()) == 4 * SEVEN_B.parameters


def test_under_bf16_a_reference_has_two_bytes_for_what_linear_layers_hold() -> None:
    """30 layers of 4 H H + 3 H I and the head V H; H 4,096, I 11,008, V 102,400."""
    half = 30 * (4 * 4096**2 + 3 * 4096 * 11_008) + 102_400 * 4096
    found = training_memory(SEVEN_B, config(precision="bf16"), Batch(1, 10, 10), reference=True)
    assert found["reference"] == 4 * SEVEN_B.parameters - 2 * half
    batch, how = Batch(1, 10, 10), {"precision": "bf16", "attention": "eager", "max_logits": None}
    assert scoring_memory(SEVEN_B, batch, **how)["weights"] == found["reference"]
    assert scoring_memory(SEVEN_B, batch, frozen=False, **how)["weights"] == 4 * SEVEN_B.parameters
    model = scoring_memory(SEVEN_B, batch, head=False, **how)["weights"]  # a reward model's head stays float32
    assert model == 4 * SEVEN_B.trunk - 2 * (half - 102_400 * 4096)


def test_writing_a_checkpoint_gathers_the_moments_on_every_rank() -> None:
    """Eight ranks of ZeRO 3: an eighth of weights, masters, moments and the buffer of gradients, and 12 bytes gathered."""
    found = training_memory(SEVEN_B, zero(3, 8), Batch(1, 100, 100))
    assert found["gathered"] == 12 * SEVEN_B.parameters
    assert found["weights"] + found["gradients"] + found["optimizer"] == 20 / 8 * SEVEN_B.parameters


def test_keys_and_values_of_a_token_of_the_7b_model_take_480_kib_in_bfloat16() -> None:
    assert token_bytes(SEVEN_B, 2) == 2 * 30 * 4096 * 2 == 480 * 1024


def test_the_cache_grows_by_an_eighth_until_the_longest_output_fits() -> None:
    assert room_of_keys(32, 10, 1000) == 32 + 16
    assert room_of_keys(32, 20, 1000) == 49 + 16
    assert room_of_keys(320, 0, 1000) == 320 + 40
    assert room_of_keys(32, 20, 20) == 52  # no more than there can be


@pytest.mark.parametrize(("prompt", "longest"), [(1, 1), (5, 40), (17, 48), (200, 700)])
def test_the_planned_width_is_the_caches(prompt: int, longest: int) -> None:
    cache = RowCache(1, rows=1, columns=prompt + longest)
    cache.place(row=0, columns=slice(0, prompt))
    for length in range(1, longest + 1):
        assert cache.room == room_of_keys(prompt, length - 1, longest) >= prompt + length - 1
        cache.place(row=0, columns=slice(prompt + length - 1, prompt + length))


def test_sampling_holds_the_keys_of_all_rows_that_are_side_by_side() -> None:
    backend = HFBackendConfig(batch_rows=8)
    found = hf_memory(SHAPE, backend, outputs=32, group=4, prompt=10, longest=16, half=False)
    assert found["keys and values"] == 8 * 26 * (2 * 2 * 2 * 4)
    grown = hf_memory(SHAPE, backend, outputs=32, group=4, prompt=10, longest=20, half=False)
    assert grown["keys and values"] == 8 * 30 * (2 * 2 * 2 * 4 + 2 * 4)  # a layer's keys twice while they grow
    assert found["weights"] == 4 * SHAPE.parameters


def test_vllm_takes_its_share_of_a_gpu_and_as_many_outputs_as_have_room() -> None:
    backend = VLLMBackendConfig(gpu_memory_utilization=0.5, tensor_parallel_size=2, max_num_seqs=512)
    found = vllm_memory(SEVEN_B, backend, memory=80e9, half=True, cpu=False)
    assert sum(found.values()) == 40e9
    assert found["weights"] == SEVEN_B.parameters  # two bytes, on two GPUs
    room = (40e9 - SEVEN_B.parameters) * 2 // (480 * 1024 * 1000)
    assert side_by_side(SEVEN_B, backend, found, 1000, 2) == room == 134
