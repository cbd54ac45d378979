"""What the rollout engine says of its outputs is what the trainer says of them: one distribution, from ids to weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store import Store
from stages.models import Checkpoint, load_tokenizer
from stages.rollout import HFBackendConfig, RolloutConfig, rollout
from stages.rollout.engines import resident_model
from stages.tables import Advantages, Rollouts
from stages.text import PromptConfig
from stages.training import AdamWConfig, TrainingConfig
from stages.training.batching import Batch, collate, rows_of
from stages.training.forward import completion_logprobs
from stages.training.loop import reference_model, resident_engine
from stages.update import GRPOConfig, UpdateConfig, update_policy
from tests.stages.rollout.policies import far_from_zero, questions, tiny_policy
from tests.stages.rows import advantage_row

PADDED = 7
"""Rows of the embedding behind the tokenizer's last id, as models of others have them."""


def sampled(policy: Checkpoint, temperature: float, seed: int = 0) -> Rollouts:
    """Outputs of questions of unlike length, so that shorter prompts are padded on the left while they are decoded."""
    asked = questions("1+2", "3456-78+9=", "7", "1+2+3+4+5+6")
    backend = HFBackendConfig(dtype="float32", threads=1)
    config = RolloutConfig(G=4, temperature=temperature, max_output_tokens=12, backend=backend)
    return rollout(policy, asked, PromptConfig(suffix="\n"), config, seed=seed)


def trained(policy: Checkpoint, outputs: Rollouts) -> Checkpoint:
    """The policy after one update that takes log pi_old from the rollout engine: its ratios compare engine and trainer."""
    rows = outputs.rows()
    advantages = [
        advantage_row(row["question_id"], row["sample"], [1.0 - 2.0 * (row["sample"] % 2)] * len(row["output_ids"]))
        for row in rows
    ]
    training = TrainingConfig(precision="fp32", optimizer=AdamWConfig(learning_rate=1e-2), threads=1)
    config = UpdateConfig(objective=GRPOConfig(beta=0.0), old_logprobs="rollout", training=training)
    return update_policy(policy, policy, outputs, Advantages.write(advantages), config, seed=0)


def ratios(policy: Checkpoint) -> tuple[float, float]:
    return policy.metrics["policy/ratio_min"], policy.metrics["policy/ratio_max"]


@pytest.mark.claim("sampled at T, scored at 1")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_engine_and_trainer_agree_on_every_token_at_any_temperature(store: Store, temperature: float) -> None:
    policy = tiny_policy(3, head=8, padded=PADDED)
    outputs = sampled(policy, temperature)
    assert {row["finish_reason"] for row in outputs.rows()} == {"stop", "length"}
    assert ratios(trained(policy, outputs)) == pytest.approx((1.0, 1.0), abs=1e-4)


@pytest.mark.claim("engine log-probabilities of raw logits")
def test_the_temperature_left_out_would_show_in_the_ratio(store: Store) -> None:
    policy = tiny_policy(3, head=8, padded=PADDED)
    said_to_be_of_one = Rollouts.write([row | {"temperature": 1.0} for row in sampled(policy, 0.7).rows()])
    low, high = ratios(trained(policy, said_to_be_of_one))
    assert low < 0.8
    assert high > 1.05


@pytest.mark.claim("outputs of stale weights")
def test_after_an_update_outputs_come_from_the_new_weights(store: Store) -> None:
    first = tiny_policy(3, head=8, padded=PADDED)
    second = trained(first, sampled(first, 1.0))
    outputs = sampled(second, 1.0)  # by the engine that is resident, its weights reloaded in place
    assert ratios(trained(second, outputs)) == pytest.approx((1.0, 1.0), abs=1e-4)
    low, high = ratios(trained(first, outputs))
    assert low < 0.9 < 1.1 < high, "the update moved nothing, and stale weights would not show"


@pytest.mark.claim("padded rows of the vocabulary")
def test_a_padded_row_may_be_sampled_and_adds_nothing_to_the_text(store: Store) -> None:
    policy = tiny_policy(3, head=8, padded=PADDED)
    known = len(load_tokenizer(policy))
    padded = [row for row in sampled(policy, 1.6).rows() if max(row["output_ids"]) >= known]
    assert padded, "no id behind the tokenizer's last was drawn"
    for row in padded:
        assert len(row["text"]) <= sum(token < known for token in row["output_ids"])
        assert len(row["text_ends"]) == len(row["output_ids"]) == len(row["logprobs"])


@contextlib.contextmanager
def hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the output head of the model is given, pass by pass."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def exact(model: Any, hidden_NH: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """log pi at T = 0.7 of hidden states and head as bfloat16 has them, in float64."""
    weight_VH = model.get_output_embeddings().weight.detach().bfloat16().double()
    z_NV = hidden_NH.bfloat16().double() @ weight_VH.T
    return (z_NV / 0.7).log_softmax(-1)[torch.arange(len(tokens_N)), tokens_N]


def recorded(outputs: Rollouts) -> np.ndarray:
    return np.concatenate([row["logprobs"] for row in outputs.rows()])


def scored(model: Any, batch: Batch, max_logits: int | None = None) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logp_BO = completion_logprobs(model, batch, 0.7, max_logits=max_logits).logp_BO
    return logp_BO[batch.output_mask_BO]


@pytest.mark.parametrize("precision", ["fp32", "as_computed"])
@pytest.mark.parametrize("max_logits", [None, 200])
def test_in_trainer_and_reference_logits_are_exact_in_bf16(
    store: Store, max_logits: int | None, precision: Any
) -> None:
    policy = far_from_zero()
    batch = collate(rows_of(sampled(policy, 0.7))[1], range(16))
    training = TrainingConfig(precision="bf16", head_precision=precision, threads=1)
    for model in (resident_engine(policy, training).model, reference_model(policy, training, "cpu")):
        with hidden_states(model) as seen:
            logp_N = scored(model, batch, max_logits)
        expected_N = exact(model, seen[-1].flatten(0, 1)[batch.source_index_N], batch.targets_N)
        error = (logp_N - expected_N).abs()
        assert error.max() < 1e-3 if precision == "fp32" else error.mean() > 1e-2


@pytest.mark.parametrize("precision", ["fp32", "as_computed"])
def test_the_sampler_s_recorded_logprobs_are_exact_in_bf16(store: Store, precision: Any) -> None:
    policy, backend = (
        far_from_zero(),
        HFBackendConfig(dtype="bfloat16", head_precision=precision, threads=1),
    )
    config = RolloutConfig(G=1, temperature=0.7, max_output_tokens=12, backend=backend)
    model = resident_model(policy, backend)
    with hidden_states(model) as seen:
        (row,) = rollout(policy, questions("1+2"), PromptConfig(suffix="\n"), config, seed=0).rows()
    length = len(row["output_ids"])
    hidden_NH = torch.cat([hidden_BTH[:, -1] for hidden_BTH in seen])[:length]
    error = (torch.tensor(row["logprobs"]) - exact(model, hidden_NH, torch.tensor(row["output_ids"]))).abs()
    assert length > 1
    assert error.max() < 1e-3 if precision == "fp32" else error.mean() > 1e-2


def test_float32_heads_bring_sampler_and_trainer_closer_in_bf16(store: Store) -> None:
    policy, apart = far_from_zero(), []
    for precision in ("as_computed", "fp32"):
        backend = HFBackendConfig(dtype="bfloat16", head_precision=precision, threads=1)
        config = RolloutConfig(G=32, temperature=0.7, max_output_tokens=12, backend=backend)
        outputs = rollout(policy, questions("1+2", "7", "12-3"), PromptConfig(suffix="\n"), config, seed=0)
        training = TrainingConfig(precision="bf16", head_precision=precision, threads=1)
        rows = rows_of(outputs)[1]
        logp_N = scored(resident_engine(policy, training).model, collate(rows, range(len(rows))))
        apart.append(float(np.abs(logp_N.numpy() - recorded(outputs)).mean()))
    assert apart[1] < 0.5 * apart[0]
