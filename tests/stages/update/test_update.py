"""The update stage: a tiny real model, real engines, gradients compared with a plain loop over Eq. 3."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.models import Checkpoint, load_model, write_tensors
from stages.tables import Advantages, Rollouts
from stages.training import AdamWConfig, TrainingConfig
from stages.training.forward import completion_logprobs
from stages.update import GRPOConfig, UpdateConfig, update_policy
from stages.update.loss import MiniBatch
from tests.stages.rows import advantage_row, rollout_row
from tests.stages.training.tiny import remembered

VOCABULARY, Q, G = 13, 3, 4


@remembered
def tiny_policy(seed: int = 0) -> Checkpoint:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape)

    def fill(folder: Path) -> None:
        model.config.save_pretrained(folder)
        write_tensors(folder / "model.safetensors", dict(model.named_parameters()))

    return Checkpoint.write(fill)


def exploration(*, distinct: bool = True) -> tuple[Rollouts, Advantages]:
    """Q x G outputs of uneven lengths with group-wise centred advantages; not `distinct`: pairs of equal outputs."""
    rng = random.Random(1)
    rows: list[dict[str, Any]] = []
    advantages: list[dict[str, Any]] = []
    for question in range(Q):
        prompt = [rng.randrange(VOCABULARY) for _ in range(2 + question)]
        for sample in range(G):
            ids = [rng.randrange(VOCABULARY) for _ in range(1 + rng.randrange(6))]
            value = 1.0 if sample < G // 2 else -1.0
            if not distinct and sample % 2:
                ids = rows[-1]["output_ids"]
            rows.append(rollout_row(f"q{question}", sample, ids) | {"prompt_ids": prompt})
            advantages.append(advantage_row(f"q{question}", sample, [value] * len(ids)))
    return Rollouts.write(rows), Advantages.write(advantages)


def sgd_like(**changes: Any) -> UpdateConfig:
    """fp32, no clipping by norm, so that one AdamW step shows the gradient's sign and scale."""
    adamw = AdamWConfig(learning_rate=1e-3)
    training = TrainingConfig(precision="fp32", max_grad_norm=0.0, optimizer=adamw, threads=1)
    return UpdateConfig(**{"training": training, **changes})


def weights_of(checkpoint: Checkpoint) -> torch.Tensor:
    model = load_model(checkpoint, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_by_definition(policy: Checkpoint, reference: Checkpoint, beta: float) -> torch.Tensor:
    """Eq. 3 and 4 row by row, without padding, batching or merging: -grad J at pi_theta = pi_old."""
    outputs, advantages = exploration()
    model, frozen = (load_model(c, dtype=torch.float32) for c in (policy, reference))
    objective = torch.zeros(())
    for row, advantage in zip(outputs.rows(), advantages.rows(), strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        start, length = len(row["prompt_ids"]), len(row["output_ids"])

        def logp(of: Any, ids: torch.Tensor = ids, start: int = start) -> torch.Tensor:
            table = of(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            return table.gather(-1, ids[0, start:, None]).squeeze(-1)

        new, ref = logp(model), logp(frozen).detach()
        ratio = (new - new.detach()).exp()
        kl = (ref - new).exp() - (ref - new) - 1
        objective = objective + (ratio * torch.tensor(advantage["advantage"]) - beta * kl).sum() / length
    (-objective / (Q * G)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient_of_stage(policy: Checkpoint, reference: Checkpoint, config: UpdateConfig, **data: bool) -> torch.Tensor:
    """The gradient the stage used, read from AdamW's first moment: m = (1 - beta_1) g after one step."""
    from stages.models import load_optimizer_state

    outputs, advantages = exploration(**data)
    evict()
    updated = update_policy(policy, reference, outputs, advantages, config, seed=0)
    state = load_optimizer_state(updated)
    model = load_model(policy, dtype=torch.float32)
    return torch.cat([state[f"{name}/exp_avg"].flatten() for name, _ in model.named_parameters()]) / (1 - 0.9)


@pytest.mark.claim("detokenised and tokenised again", "Eq. 3")
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_gradient_is_that_of_eq_3(store: Store, beta: float) -> None:
    policy, reference = tiny_policy(0), tiny_policy(1)
    found = gradient_of_stage(policy, reference, sgd_like(objective=GRPOConfig(beta=beta)))
    expected = gradient_by_definition(policy, reference, beta)
    assert torch.linalg.vector_norm(found - expected) < 1e-6 * torch.linalg.vector_norm(expected)


def test_the_gradient_does_not_depend_on_micro_batches(store: Store) -> None:
    policy, reference = tiny_policy(0), tiny_policy(1)
    whole = gradient_of_stage(policy, reference, sgd_like(micro_batch_tokens=10_000))
    parts = gradient_of_stage(policy, reference, sgd_like(micro_batch_tokens=12))
    assert torch.linalg.vector_norm(whole - parts) < 1e-6 * torch.linalg.vector_norm(whole)


@pytest.mark.claim("equal outputs dropped")
def test_merging_equal_outputs_changes_the_work_and_not_the_gradient(store: Store) -> None:
    policy, reference = tiny_policy(0), tiny_policy(1)
    merged = gradient_of_stage(policy, reference, sgd_like(merge_equal_outputs=True), distinct=False)
    apart = gradient_of_stage(policy, reference, sgd_like(merge_equal_outputs=False), distinct=False)
    assert torch.linalg.vector_norm(merged - apart) < 1e-6 * torch.linalg.vector_norm(apart)


def test_merged_outputs_are_computed_once(store: Store) -> None:
    outputs, advantages = exploration(distinct=False)
    policy = tiny_policy()
    updated = update_policy(policy, policy, outputs, advantages, sgd_like(), seed=0)
    assert updated.metrics["policy/outputs_computed"] == Q * G / 2


@pytest.mark.claim("packed rows that see each other")
def test_the_share_of_padding_is_that_of_all_micro_batches(store: Store) -> None:
    outputs, advantages = exploration()
    policy = tiny_policy()
    lengths = sorted((len(row["prompt_ids"]) + len(row["output_ids"]) for row in outputs.rows()), reverse=True)
    apart = sgd_like(training=sgd_like().training.override({"share_prompts": False}))
    together = update_policy(policy, policy, outputs, advantages, apart, seed=0).metrics
    assert together["policy/padding_share"] == pytest.approx(1 - sum(lengths) / (Q * G * lengths[0]))
    for config in (apart.override({"micro_batch_tokens": 1}), sgd_like()):  # a row behind shared prompts has no padding
        assert update_policy(policy, policy, outputs, advantages, config, seed=0).metrics["policy/padding_share"] == 0.0


def test_idle_rows_cost_nothing_without_kl_and_still_count_in_the_mean(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    idle = [
        row | {"advantage": [0.0] * len(row["advantage"])} if row["sample"] == 3 else row for row in advantages.rows()
    ]
    config = sgd_like(objective=GRPOConfig(beta=0.0))
    updated = update_policy(policy, policy, outputs, Advantages.write(idle), config, seed=0)
    # Q outputs of advantage 0 left out; the loss -mean(A) still has Q * G in its denominator: (2 - 1) * Q / (Q * G).
    assert updated.metrics["policy/outputs_computed"] == Q * (G - 1)
    assert updated.metrics["policy/loss"] == pytest.approx(-1 / G)


def test_groups_that_agree_leave_the_policy_exactly_as_it_was(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    idle = Advantages.write([row | {"advantage": [0.0] * len(row["advantage"])} for row in advantages.rows()])
    updated = update_policy(policy, policy, outputs, idle, sgd_like(objective=GRPOConfig(beta=0.0)), seed=0)
    assert torch.equal(weights_of(policy), weights_of(updated))


@pytest.mark.claim("the engine's log-probabilities as log pi_old", "Eq. 15-17")
def test_the_ratio_is_exactly_one_and_kl_exactly_zero_at_the_first_update(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    metrics = update_policy(policy, policy, outputs, advantages, sgd_like(), seed=0).metrics
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/kl"] == 0.0
    assert metrics["policy/clip_fraction"] == 0.0


@pytest.mark.claim("line 10")
def test_the_ratio_leaves_one_at_the_second_pass(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    metrics = update_policy(policy, policy, outputs, advantages, sgd_like(mu=2), seed=0).metrics
    assert metrics["policy/ratio_max"] > 1.0


@pytest.mark.parametrize(
    ("changes", "same_reference", "expected"),
    [
        ({}, True, 1),
        ({}, False, 2),
        ({"mu": 2}, True, 2),
        ({"mu": 2}, False, 3),
        ({"mini_batches": 3}, True, 2 + 3),
        ({"mini_batches": 3, "mu": 2}, True, 2 + 6),
        ({"mini_batches": 3, "mu": 2}, False, 3 + 2 + 6),
    ],
)
def test_no_mini_batch_is_forwarded_twice_under_one_policy(
    store: Store, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], same_reference: bool, expected: int
) -> None:
    """Three questions, a micro-batch each: the first step's own forward gives log pi_old, and log pi_ref where equal."""
    forwards: list[int] = []

    def counted(model: Any, batch: Any, *args: Any, **options: Any) -> Any:
        forwards.append(len(batch.rows))
        return completion_logprobs(model, batch, *args, **options)

    monkeypatch.setattr("stages.update.loss.completion_logprobs", counted)
    policy = tiny_policy()
    reference = policy if same_reference else tiny_policy(seed=1)
    outputs, advantages = exploration()
    config = sgd_like(**changes)
    mini_batches = config.mini_batches
    update_policy(policy, reference, outputs, advantages, config, seed=0)
    assert len(forwards) == expected
    assert sum(forwards[-config.mu * mini_batches :]) == config.mu * sum(forwards[-mini_batches:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("same_reference", [True, False])
def test_later_passes_use_the_policy_of_before_the_first_step_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, same_reference: bool
) -> None:
    config = sgd_like(mu=3, mini_batches=2).override({"training.precision": precision})

    def content(folder: str) -> str | None:
        evict()
        with use_store(Store(tmp_path / folder)):
            policy = tiny_policy()
            reference = policy if same_reference else tiny_policy(seed=1)
            return update_policy(policy, reference, *exploration(), config, seed=0).content

    kept, make = content("kept"), MiniBatch.of

    def with_a_pass_before(*given: Any) -> MiniBatch:
        made = make(*given)
        made.remember_policy(given[1], as_reference=same_reference)
        return made

    monkeypatch.setattr(MiniBatch, "of", with_a_pass_before)
    monkeypatch.setattr(MiniBatch, "take_policy_as_reference", lambda _: None)
    assert content("computed before") == kept


@pytest.mark.claim("line 10")
def test_an_update_makes_rewarded_outputs_likelier(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    before = update_policy(policy, policy, outputs, advantages, sgd_like(objective=GRPOConfig(beta=0.0)), seed=0)
    # On the same data, from the new policy: mean of A log pi must have risen; it is the second update's ratio-weighted sum.
    after = mean_advantage_logp(before, outputs, advantages)
    assert after > mean_advantage_logp(policy, outputs, advantages)


def mean_advantage_logp(policy: Checkpoint, outputs: Rollouts, advantages: Advantages) -> float:
    model, total = load_model(policy, dtype=torch.float32), 0.0
    for row, advantage in zip(outputs.rows(), advantages.rows(), strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        with torch.no_grad():
            table = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        logp = table.gather(-1, torch.tensor(row["output_ids"])[:, None]).mean()
        total += float(logp) * advantage["advantage"][0]
    return total


def test_greedy_outputs_are_refused(store: Store) -> None:
    policy = tiny_policy()
    _, advantages = exploration()
    outputs = Rollouts.write([row | {"temperature": 0.0} for row in exploration()[0].rows()])
    with pytest.raises(ValueError, match="greedy outputs come from no distribution"):
        update_policy(policy, policy, outputs, advantages, sgd_like(), seed=0)


def test_a_warm_engine_and_a_cold_one_give_the_same_bits(store: Store) -> None:
    outputs, advantages = exploration()

    def two_updates(*, cold: bool) -> Checkpoint:
        policy = first = tiny_policy()
        for seed in (10 + cold, 11):  # a seed of its own, so that the first update is not found in the store
            if cold:
                evict()
            policy = update_policy(policy, first, outputs, advantages, sgd_like(), seed=seed)
        return policy

    warm = two_updates(cold=False)
    assert two_updates(cold=True).content == warm.content


@pytest.mark.claim("training for hours on nothing", "rows masked as a whole")
def test_a_step_without_outputs_leaves_the_policy_as_it_is_and_warns(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    masked = Advantages.write([row | {"advantage": None} for row in advantages.rows()])
    with pytest.warns(UserWarning, match="every output of a step is masked out"):
        updated = update_policy(policy, policy, outputs, masked, sgd_like(mini_batches=2), seed=0)
    assert torch.equal(weights_of(policy), weights_of(updated))
    assert updated.metrics["policy/skipped_steps"] == 2


def test_a_mini_batch_whose_every_output_is_masked_is_a_skipped_step(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    rows = advantages.rows()
    kept = rows[0]["question_id"]
    one = Advantages.write([row if row["question_id"] == kept else row | {"advantage": None} for row in rows])
    updated = update_policy(policy, policy, outputs, one, sgd_like(mini_batches=2), seed=0)
    assert updated.metrics["policy/skipped_steps"] == 1
    assert not torch.equal(weights_of(policy), weights_of(updated))


@pytest.mark.claim("sampled at T, scored at 1")
def test_outputs_of_another_temperature_than_configured_are_refused(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    with pytest.raises(ValueError, match=r"expected outputs sampled at temperature 0\.7, found 1 in all of them"):
        update_policy(policy, policy, outputs, advantages, sgd_like(temperature=0.7), seed=0)


@pytest.mark.claim("sampled at T, scored at 1")
def test_outputs_of_two_temperatures_are_refused(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    mixed = Rollouts.write([row | {"temperature": 0.5 if row["sample"] else 1.0} for row in outputs.rows()])
    with pytest.raises(ValueError, match=r"expected outputs of one temperature, found \[0.5, 1.0\]"):
        update_policy(policy, policy, mixed, advantages, sgd_like(), seed=0)


@pytest.mark.claim("5.2.1 online, offline")
def test_offline_outputs_take_their_ratio_from_what_their_own_policy_said(store: Store) -> None:
    policy = tiny_policy()
    outputs, advantages = exploration()
    metrics = update_policy(policy, policy, outputs, advantages, sgd_like(old_logprobs="rollout"), seed=0).metrics
    # The rows say -1.0 at every token: the ratio is pi_theta / e^-1, not 1.
    assert metrics["policy/ratio_min"] != 1.0
    assert metrics["policy/ratio_max"] < 2.718281828
