"""One batch, one gradient: whatever the micro-batches, row order, padding, accumulation, and whatever runs them.

Ranks of a process group: tests/stages/training/test_ranks.py. One step per output: tests/stages/kernels/test_advantage.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.residency import evict
from pipeline.store import Store
from stages.models import load_model
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig
from stages.update import (
    CISPOConfig,
    DAPOConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    PPOConfig,
    RFTConfig,
    RLOOConfig,
    UpdateConfig,
    update_policy,
)
from stages.update.loss import Example
from tests.stages.training.tiny import tiny_checkpoint
from tests.stages.update.exact import policy_model, relative, trained_gradient
from tests.stages.update.test_coefficients import examples
from tests.stages.update.test_update import exploration

OBJECTIVES: dict[str, tuple[ObjectiveConfig, str]] = {
    "grpo": (GRPOConfig(beta=0.5), "tokens"),
    "grpo_token_mean": (GRPOConfig(beta=0.5, aggregation="token_mean"), "tokens"),
    "ppo": (PPOConfig(), "tokens"),
    "rft": (RFTConfig(), "correct"),
    "dpo": (DPOConfig(), "pairs"),
    "dr_grpo": (DrGRPOConfig(length=16), "outputs"),
    "dapo": (DAPOConfig(), "outputs"),
    "gspo": (GSPOConfig(), "outputs"),
    "cispo": (CISPOConfig(), "outputs"),
    "rloo": (RLOOConfig(), "outputs"),
}


VOCABULARY = 26


def gradient(objective: ObjectiveConfig, given: Sequence[Example], tokens: int = 40) -> torch.Tensor:
    config = UpdateConfig(objective=objective, micro_batch_tokens=tokens)
    return trained_gradient(given, config, reference=policy_model(1), old=policy_model(2))[0]


@pytest.mark.claim("means of micro-batch means", "Eq. 5", "a gradient that depends on order or padding")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_of_any_size_give_one_gradient(name: str) -> None:
    objective, kind = OBJECTIVES[name]
    whole = gradient(objective, examples(kind), tokens=10_000)
    for tokens in (1, 30, 57):
        assert relative(gradient(objective, examples(kind), tokens), whole) < 1e-12


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "dpo"])  # whose pairs are never merged
def test_an_output_of_weight_three_is_three_equal_outputs(name: str) -> None:
    """Also where the denominator counts tokens: those of every output that a row counts for."""
    objective, kind = OBJECTIVES[name]
    given = examples(kind)
    weights = [3 if place % 3 == 0 else 1 for place in range(len(given))]
    merged = [dataclasses.replace(one, weight=float(weight)) for one, weight in zip(given, weights, strict=True)]
    apart = [one for one, weight in zip(given, weights, strict=True) for _ in range(weight)]
    # Qwen's norms are in float32 whatever the model's precision: three times a gradient is rounded otherwise than its sum.
    assert relative(gradient(objective, merged), gradient(objective, apart)) < 1e-6


@pytest.mark.claim("a gradient that depends on order or padding")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_in_any_order_give_one_gradient(name: str) -> None:
    objective, kind = OBJECTIVES[name]
    given = examples(kind)
    shuffled = random.Random(1).sample(given, len(given))
    assert relative(gradient(objective, shuffled), gradient(objective, given)) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_in_chunks_give_one_gradient_loss_and_entropy(name: str, temperature: float) -> None:
    objective, kind = OBJECTIVES[name]
    config = UpdateConfig(objective=objective, micro_batch_tokens=60)

    def step(max_logits: int | None) -> tuple[torch.Tensor, dict[str, float]]:
        found, noted = trained_gradient(
            examples(kind),
            config,
            reference=policy_model(1),
            old=policy_model(2),
            temperature=temperature,
            max_logits=max_logits,
        )
        return found, noted.metrics(beta=0.5, seconds=1.0, computed=0)

    whole, numbers = step(None)
    assert numbers["policy/entropy"] > 1.0
    for rows in (1, 5, 10_000):
        chunked, found = step(rows * VOCABULARY)
        assert relative(chunked, whole) < 1e-12
        assert found == pytest.approx(numbers, rel=1e-12, abs=1e-14)


def stage_gradient(
    engine: object,
    max_logits: int | None = None,
    activation_checkpointing: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """The gradient that `update_policy` used, by parameter, read from AdamW's first moment: m = (1 - beta_1) g."""
    training = TrainingConfig(
        engine=engine,  # type: ignore[arg-type]
        precision="fp32",
        max_grad_norm=0.0,
        optimizer=AdamWConfig(learning_rate=1e-3),
        threads=1,
        max_logits=max_logits,
        activation_checkpointing=activation_checkpointing,
    )
    outputs, advantages = exploration()
    evict()
    policy = tiny_checkpoint()
    updated = update_policy(policy, policy, outputs, advantages, UpdateConfig(training=training, **changes), seed=0)
    state = load_file(Path(updated.path) / "optimizer.safetensors")
    names = [name for name, _ in load_model(policy, dtype=torch.float32).named_parameters()]
    return {name: state[f"{name}/exp_avg"] / 0.1 for name in names}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return relative(*(torch.cat([g.flatten() for g in side.values()]) for side in (found, expected)))


ZERO = [(stage, again) for stage in (0, 1, 2, 3) for again in (False, True)]


@pytest.mark.claim("a gradient that depends on order or padding")
@pytest.mark.parametrize(
    ("zero_stage", "checkpointing"),
    [
        (None, False),
        (None, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ZERO),
    ],
)
def test_chunks_and_recomputed_activations_have_the_gradient_of_neither(
    store: Store, zero_stage: Any, checkpointing: bool
) -> None:
    plain = stage_gradient({"kind": "torch"}, micro_batch_tokens=60)
    engine = {"kind": "torch"} if zero_stage is None else DeepSpeedEngineConfig(zero_stage=zero_stage)
    found = stage_gradient(
        engine, max_logits=3 * VOCABULARY, activation_checkpointing=checkpointing, micro_batch_tokens=60
    )
    assert distance(found, plain) < 1e-6
