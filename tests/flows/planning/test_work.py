from __future__ import annotations

from dataclasses import replace

import pytest

from flows.planning.machine import PRESETS
from flows.planning.work import Work, decoding_work, scoring_work, seconds_of, takes_head_again, training_work
from tests.flows.planning.conftest import SEVEN_B, SHAPE, config


def test_training_is_six_times_parameters_times_tokens_and_attention() -> None:
    """8 tokens in rows of 4; 68 numbers in matrices, pairs of 4 x 2 x 4 x 2 layers, 6 scored positions of a head of 20."""
    work = training_work(SHAPE, config(), 2, 1, 3, 100)
    forward = 8 * (2 * 68 + 4 * 2 * 4 * 2) + 2 * 6 * 20
    assert work.flops == 3 * forward
    assert training_work(SHAPE, config(activation_checkpointing=True), 2, 1, 3, 100).flops == 4 * forward
    assert scoring_work(SHAPE, config(), 2, 1, 3, 100).flops == forward


def test_a_shared_prompt_is_computed_once_a_micro_batch() -> None:
    """2 prompts of 5 tokens and 8 outputs of 3: one attends to 5 x 5 places, 4 outputs to 4 x 3 x 8; 24 scored positions."""
    shared = scoring_work(SHAPE, config(), 8, 5, 3, 100, group=4)
    assert shared.tokens == 2 * 5 + 8 * 3
    assert shared.flops == 34 * 2 * 68 + 4 * 2 * 2 * (2 * 25 + 8 * 3 * 8) + 2 * 24 * 20
    # An output takes 3 + 8 / 4 of a budget: 25 hold one group; 20 three of its outputs, and a prompt more.
    assert scoring_work(SHAPE, config(), 8, 5, 3, 25, group=4).tokens == 2 * 5 + 8 * 3
    assert scoring_work(SHAPE, config(), 9, 5, 3, 20, group=9).tokens == 3 * 5 + 9 * 3
    for apart in ({"share_prompts": False}, {"attention": "flash_attention_2"}):
        assert scoring_work(SHAPE, config(**apart), 8, 5, 3, 100, group=4).tokens == 8 * 8


def test_a_large_model_costs_six_n_a_token_within_a_tenth() -> None:
    work = training_work(SEVEN_B, config(), 16, 128, 512, 1 << 20)
    assert work.flops == pytest.approx(6 * SEVEN_B.parameters * 16 * 640, rel=0.1)


def test_micro_batches_enter_every_layer_anew() -> None:
    assert (
        training_work(SHAPE, config(), 4, 1, 3, 8).layers == 3 * 2 * 2
    )  # forward and backward, two batches, two layers


def test_zero_3_gathers_weights_in_every_micro_batch() -> None:
    """Of 8 tokens in two micro-batches; each copy is read and written."""
    plain, first, third = (
        training_work(SHAPE, config(engine={"kind": "deepspeed", "zero_stage": stage}), 4, 1, 3, 8)
        for stage in (0, 1, 3)
    )
    assert first.traffic - plain.traffic == 2 * 2 * 4 * SHAPE.parameters
    assert third.traffic - first.traffic == 2 * (2 * 2) * 4 * SHAPE.parameters


def test_decoding_reads_the_weights_at_every_token_of_the_longest_output() -> None:
    short, long = (decoding_work(SHAPE, 1, 4, 5, 10, longest, side_by_side=4, half=False) for longest in (10, 30))
    assert long.reads - short.reads == 20 * 4 * (68 + 20)
    assert long.traffic == short.traffic
    assert long.flops == short.flops


def test_seconds_are_work_over_rates_over_utilisation_and_fixed_costs() -> None:
    profile = PRESETS["cpu"].override({"fp32": {"1": 100.0}, "bandwidth": 10.0, "training": 0.5, "layer_seconds": 0.25})
    assert seconds_of(Work(flops=200, traffic=30, layers=4), profile, 64, "fp32") == (2 + 3) / 0.5 + 4 * 0.25
    work = Work(flops=200, traffic=30, reads=40)
    assert seconds_of(work, profile, 64, "fp32") == (2 + 3 + 4) / 0.5
    assert seconds_of(work, profile.override({"reading": 40.0}), 64, "fp32") == (2 + 3 + 1) / 0.5


def test_float32_logits_of_bf16_take_a_second_product_of_the_head_on_a_cpu() -> None:
    """6 scored positions of a head of 20 in training, 1 + 40 in decoding; there its weights are read again at 30 tokens."""
    assert takes_head_again("fp32", half=True, gpu=False)
    assert not any(takes_head_again(*how, half=half, gpu=gpu) for *how, half, gpu in OTHERWISE)
    once, again = (training_work(SHAPE, config(), 2, 1, 3, 100, again=again) for again in (False, True))
    assert again == replace(once, flops=once.flops + 2 * 6 * 20)
    once, again = (scoring_work(SHAPE, config(), 2, 1, 3, 100, again=again) for again in (False, True))
    assert again == replace(once, flops=once.flops + 2 * 6 * 20)
    once, again = (
        decoding_work(SHAPE, 1, 4, 5, 10, 30, side_by_side=4, half=True, again=again) for again in (False, True)
    )
    assert again == replace(once, flops=once.flops + 2 * 41 * 20, reads=once.reads + 30 * 2 * 20)


OTHERWISE = [("as_computed", True, False), ("fp32", False, False), ("fp32", True, True)]
