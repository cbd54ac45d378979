"""What implementations of these methods get wrong in the loss and around it; docs/correctness.md lists it with the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.store import Store
from stages.models import WEIGHTS, Checkpoint, copy_description, load_model, write_tensors
from stages.tables import Advantages, Rollouts
from stages.training import AdamWConfig, TrainingConfig
from stages.update import DAPOConfig, DrGRPOConfig, GRPOConfig, ObjectiveConfig, RFTConfig, UpdateConfig, update_policy
from stages.update.stage import join
from tests.stages.rows import advantage_row, rollout_row
from tests.stages.training.tiny import tiny_checkpoint
from tests.stages.update.exact import defined_gradient, logprobs, policy_model, relative, trained_gradient
from tests.stages.update.test_coefficients import examples, own, update


def k3_of(model: Any, reference: Any, example: Any) -> torch.Tensor:
    with torch.no_grad():
        d = logprobs(reference, example) - logprobs(model, example)
    return d.exp() - d - 1


@pytest.mark.claim("a loss of 0 taken for a fault")
def test_advantages_that_add_up_to_zero_have_no_loss_and_a_gradient() -> None:
    """A loss of 0 is no fault: at ratio 1 it is minus the mean advantage, and the group's mean is 0 by construction."""
    given = examples("outputs")  # 1.5, -0.5, 0.25, -1.25 in each group
    found, noted = trained_gradient(given, update(GRPOConfig(beta=0.0)))
    assert noted.sums["loss"] == pytest.approx(0.0, abs=1e-15)
    assert found.norm() > 0.1


@pytest.mark.claim("a loss of 0 taken for a fault", "Eq. 19-20")
def test_the_first_loss_is_the_kl_term_minus_the_mean_advantage() -> None:
    given, reference = examples("tokens"), policy_model(1)
    _, noted = trained_gradient(given, update(GRPOConfig(beta=0.5)), reference=reference)
    kl = torch.stack([k3_of(policy_model(), reference, example).mean() for example in given]).mean()
    advantage = sum(sum(example.advantage) / len(example.advantage) for example in given) / len(given)
    assert noted.sums["kl"] == pytest.approx(kl.item(), rel=1e-9)
    assert noted.sums["loss"] == pytest.approx(0.5 * kl.item() - advantage, rel=1e-9)


@pytest.mark.claim("a policy loss with the KL term in it")
@pytest.mark.parametrize(("beta", "length"), [(0.5, 4), (2.0, 64), (0.0, 8)])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_the_policy_loss_is_the_loss_without_its_kl_term(aggregation: Any, beta: float, length: int) -> None:
    given = examples("tokens")
    divisor = length if aggregation == "constant" else None
    config = update(GRPOConfig(beta=beta, aggregation=aggregation, length=divisor))
    _, noted = trained_gradient(given, config, reference=policy_model(1))
    tokens = sum(len(example.output_ids) for example in given)
    expected = 0.0  # at ratio 1 minus the advantages under the weights of the aggregation
    for example in given:
        own = {"token_mean": 1 / tokens, "sequence_mean": 1 / (len(given) * len(example.output_ids))}
        expected -= own.get(aggregation, 1 / (len(given) * length)) * sum(example.advantage)
    metrics = noted.metrics(beta=beta, seconds=1.0, computed=len(given))
    assert metrics["policy/policy_loss"] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.claim("terms under another mask or mean")
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_kl_and_entropy_are_reported_under_the_mask_and_mean_of_the_loss(aggregation: Any) -> None:
    given, reference, policy = examples("tokens"), policy_model(1), policy_model()
    config = update(GRPOConfig(beta=0.5, aggregation=aggregation))
    _, noted = trained_gradient(given, config, reference=reference)
    tokens = sum(len(example.output_ids) for example in given)
    kl = entropy = 0.0
    for example in given:
        weight = 1 / tokens if aggregation == "token_mean" else 1 / (len(given) * len(example.output_ids))
        ids = torch.tensor([[*example.prompt_ids, *example.output_ids]])
        with torch.no_grad():
            table = policy(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        entropy += weight * -(table.exp() * table).sum().item()
        kl += weight * k3_of(policy, reference, example).sum().item()
    assert noted.sums["weight"] == pytest.approx(1.0)
    assert noted.sums["kl"] == pytest.approx(kl, rel=1e-9)
    assert noted.sums["entropy"] == pytest.approx(entropy, rel=1e-9)


@pytest.mark.claim("the clip's sign")
def test_the_clip_fraction_counts_the_side_that_the_advantage_clips() -> None:
    given, earlier, policy = examples("tokens"), policy_model(2), policy_model()
    _, noted = trained_gradient(given, update(GRPOConfig(beta=0.0, eps=0.2)), old=earlier)
    fraction = either_side = 0.0
    for example in given:
        with torch.no_grad():
            ratio = (logprobs(policy, example) - logprobs(earlier, example)).exp()
        advantage = own(example, ratio)
        clipped = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
        fraction += clipped.double().mean().item() / len(given)
        either_side += ((ratio > 1.2) | (ratio < 0.8)).double().mean().item() / len(given)
    assert noted.sums["clip_fraction"] == pytest.approx(fraction, rel=1e-9)
    assert 0 < fraction < either_side < 1


@pytest.mark.claim("truncated outputs treated by accident", "rows masked as a whole")
@pytest.mark.parametrize(
    ("objective", "share"),
    [
        (GRPOConfig(beta=0.0), lambda rows, row: 1 / (len(rows) * len(row.output_ids))),
        (DAPOConfig(), lambda rows, _: 1 / sum(len(row.output_ids) for row in rows)),
        (DrGRPOConfig(length=16), lambda rows, _: 1 / (len(rows) * 16)),
    ],
)
def test_a_masked_output_counts_in_no_denominator(store: Store, objective: ObjectiveConfig, share: Any) -> None:
    given = examples("outputs")
    outputs, advantages = [], []
    for number, example in enumerate(given):
        row = rollout_row(example.question_id, number, list(example.output_ids))
        outputs.append(row | {"prompt_ids": list(example.prompt_ids)})
        masked = number in (1, 6)
        advantages.append(advantage_row(example.question_id, number, None if masked else list(example.advantage)))
    joined = join(Rollouts.write(outputs), Advantages.write(advantages))
    kept = [example for number, example in enumerate(given) if number not in (1, 6)]
    found, _ = trained_gradient(joined, update(objective))
    assert relative(found, defined_gradient(kept, own, weight=lambda row: share(kept, row))) < 1e-9


@pytest.mark.claim("RFT averaged over right outputs only")
def test_right_outputs_are_averaged_over_all_and_wrong_ones_cost_nothing() -> None:
    given = examples("correct")
    right = [example for example in given if example.advantage[0] == 1.0]
    found, noted = trained_gradient(given, update(RFTConfig()))
    expected = defined_gradient(right, own, weight=lambda row: 1 / (len(given) * len(row.output_ids)))
    assert relative(found, expected) < 1e-9
    assert noted.tokens == sum(len(row.prompt_ids) + len(row.output_ids) for row in right)


def exact(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"precision": "fp32", "max_grad_norm": 0.0, "threads": 1} | changes))


def one_question(*outputs: tuple[list[int], float]) -> tuple[Rollouts, Advantages]:
    rows = [rollout_row("q", sample, ids) for sample, (ids, _) in enumerate(outputs)]
    advantages = [advantage_row("q", sample, [value] * len(ids)) for sample, (ids, value) in enumerate(outputs)]
    return Rollouts.write(rows), Advantages.write(advantages)


@pytest.mark.claim("dropout left on")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_is_off_in_policy_old_policy_and_reference(store: Store, precision: Any) -> None:
    policy = tiny_checkpoint(attention_dropout=0.5)
    tables = one_question(([5, 6, 7], 1.0), ([8, 9], -1.0))
    # Two passes make pi_old a forward of its own; a rate below every weight's resolution keeps the policy where it is.
    training = exact(precision=precision, optimizer=AdamWConfig(learning_rate=1e-30))
    metrics = update_policy(policy, policy, *tables, UpdateConfig(mu=2, training=training), seed=0).metrics
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/kl"] == 0.0
    assert metrics["policy/grad_norm"] > 0


@pytest.mark.claim("a reference loaded for beta = 0")
def test_without_a_kl_term_no_reference_is_read_and_no_kl_reported(store: Store) -> None:
    unreadable = Checkpoint.write(lambda folder: (folder / "note.txt").write_text("no model here"))
    tables = one_question(([5, 6, 7], 1.0), ([8, 9], -1.0))
    config = UpdateConfig(objective=GRPOConfig(beta=0.0), training=exact())
    metrics = update_policy(tiny_checkpoint(), unreadable, *tables, config, seed=0).metrics
    assert "policy/kl" not in metrics
    with pytest.raises(Exception, match=r"config\.json|missing model\.safetensors"):
        update_policy(tiny_checkpoint(), unreadable, *tables, UpdateConfig(training=exact()), seed=0)


@pytest.mark.claim("exp(d) - d - 1 that overflows or rounds")
def test_a_divergence_beyond_float32_skips_the_step_and_is_counted(store: Store) -> None:
    reference = tiny_checkpoint(tie_word_embeddings=False)
    weights = load_file(reference.path / WEIGHTS)
    weights["lm_head.weight"] *= 1e5  # logits hundreds of nats apart: pi_ref / pi_theta is above e^88.7

    def fill(folder: Path) -> None:
        copy_description(reference.path, folder)
        write_tensors(folder / WEIGHTS, weights)

    policy = Checkpoint.write(fill)
    tables = one_question(([5, 6, 7], 1.0), ([8, 9], -1.0))
    updated = update_policy(policy, reference, *tables, UpdateConfig(training=exact()), seed=0)
    assert updated.metrics["policy/skipped_steps"] == 1
    after = load_file(updated.path / WEIGHTS)
    assert all(tensor.equal(weights[name]) for name, tensor in after.items())


@pytest.mark.claim("the end of sequence outside the loss")
def test_rewarding_an_output_that_ended_teaches_to_end_there(store: Store) -> None:
    """The sampled end of sequence (id 1) is in the loss; without it a policy never learns to stop, or unlearns it."""
    policy = tiny_checkpoint()
    training = exact(optimizer=AdamWConfig(learning_rate=1e-3))
    config = UpdateConfig(objective=GRPOConfig(beta=0.0), training=training)
    updated = update_policy(policy, policy, *one_question(([5, 6, 1], 1.0), ([5, 6, 7], -1.0)), config, seed=0)
    before, after = (end_of_sequence_after(checkpoint, [1, 2, 5, 6]) for checkpoint in (policy, updated))
    assert after > before + 1e-3


def end_of_sequence_after(checkpoint: Checkpoint, ids: list[int]) -> float:
    model = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[1])
