"""Two policies on the same outputs: by hand from all logits, exactly equal where the policies are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.residency import evict
from pipeline.store import Store
from stages.logprobs import LogprobsConfig, compare_policies, score_reference
from stages.models import Checkpoint, load_model
from stages.tables import Rollouts
from stages.training import AdamWConfig, TrainingConfig
from stages.training.loop import publish, resident_engine
from tests.stages.rows import rollout_row
from tests.stages.training.tiny import changed, random_rows, tiny_checkpoint, update


def exact(**changes: Any) -> LogprobsConfig:
    training = TrainingConfig(precision="fp32", optimizer=AdamWConfig(learning_rate=1e-2), threads=1)
    return LogprobsConfig(**({"training": training} | changes))


def output_rows(temperature: float = 0.7) -> list[dict[str, Any]]:
    """Seven outputs of uneven lengths, not in the order of their lengths."""
    return [
        rollout_row(f"q{n // 3}", n % 3, row.output_ids, row.prompt_ids, logprobs=None, temperature=temperature)
        for n, row in enumerate(random_rows(7))
    ]


def trained(policy: Checkpoint) -> Checkpoint:
    """The policy after one update."""
    engine = resident_engine(policy, exact().training)
    update(engine, random_rows(4, seed=1))
    return publish(engine)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_columns_are_the_log_softmax_at_the_outputs_temperature(store: Store, temperature: float) -> None:
    reference = tiny_checkpoint()
    policy, rows = trained(reference), output_rows(temperature)
    found = compare_policies(policy, reference, Rollouts.write(rows), exact()).rows()
    for name, checkpoint in (("policy", policy), ("reference", reference)):
        model = load_model(checkpoint, dtype=torch.float32)
        for row, scored in zip(rows, found, strict=True):
            ids = torch.tensor([[*row["prompt_ids"], *row["output_ids"]]])
            logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
            table = (logits / temperature).log_softmax(-1)
            expected = table.gather(-1, torch.tensor(row["output_ids"])[:, None]).squeeze(-1)
            assert scored[name] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.claim("a reference of another time or precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_differs_from_itself_by_exactly_nothing(store: Store, precision: str) -> None:
    policy = trained(tiny_checkpoint())
    how = exact(training=exact().training.override({"precision": precision}), micro_batch_tokens=30)
    scored = compare_policies(policy, policy, Rollouts.write(output_rows()), how)
    assert all(row["policy"] == row["reference"] for row in scored.rows())
    assert scored.metrics["policy/kl_k1"] == 0.0


def test_rows_keep_the_order_of_the_outputs_in_any_micro_batch(store: Store) -> None:
    policy, rows = tiny_checkpoint(), output_rows()
    whole = compare_policies(policy, policy, Rollouts.write(rows), exact()).rows()
    assert [(row["question_id"], row["sample"]) for row in whole] == [(f"q{n // 3}", n % 3) for n in range(7)]
    parts = compare_policies(policy, policy, Rollouts.write(rows), exact(micro_batch_tokens=20)).rows()
    for one, other in zip(whole, parts, strict=True):
        assert one["policy"] == pytest.approx(other["policy"], abs=1e-5)


def test_kl_k1_is_the_mean_over_outputs_of_the_mean_over_tokens(store: Store) -> None:
    reference = tiny_checkpoint()
    scored = compare_policies(trained(reference), reference, Rollouts.write(output_rows()), exact())
    means = [
        sum(new - ref for new, ref in zip(row["policy"], row["reference"], strict=True)) / len(row["policy"])
        for row in scored.rows()
    ]
    assert scored.metrics["policy/kl_k1"] == pytest.approx(sum(means) / len(means), abs=1e-6)
    assert scored.metrics["policy/kl_k1"] != 0.0


def test_the_policy_is_scored_by_the_engine_that_trains_it(store: Store) -> None:
    reference = tiny_checkpoint()
    policy = trained(reference)
    engine = resident_engine(policy, exact().training)
    compare_policies(policy, reference, Rollouts.write(output_rows()), exact())
    assert resident_engine(policy, exact().training) is engine
    assert engine.holds == policy.digest  # and scoring changed nothing of it
    warm = compare_policies(policy, reference, Rollouts.write(output_rows()), exact(micro_batch_tokens=999)).rows()
    evict()
    cold = compare_policies(policy, reference, Rollouts.write(output_rows()), exact(micro_batch_tokens=998)).rows()
    assert warm == cold


@pytest.mark.claim("NaN of the engine becomes 0")
def test_a_logprob_that_is_not_finite_is_refused_by_its_row_and_policy(store: Store) -> None:
    # Untied, so that only rows that read token 25 meet its embedding.
    reference = tiny_checkpoint(tie_word_embeddings=False)
    outputs = Rollouts.write([rollout_row("q0", 0, [7, 8]), rollout_row("q0", 1, [25, 8])])
    policy = changed(reference, lambda weights: weights["model.embed_tokens.weight"][25].fill_(math.nan))
    with pytest.raises(ValueError, match=r"\('q0', 1\).* under the policy"):
        compare_policies(policy, reference, outputs, exact())
    with pytest.raises(ValueError, match=r"\('q0', 1\).* under the reference"):
        score_reference(policy, outputs, exact())


@pytest.mark.parametrize(("temperatures", "named"), [((0.5, 1.0), r"\[0.5, 1.0\]"), ((0.0, 0.0), "greedy")])
def test_outputs_of_two_temperatures_and_greedy_ones_are_refused(
    store: Store, temperatures: tuple[float, float], named: str
) -> None:
    policy = tiny_checkpoint()
    outputs = Rollouts.write([rollout_row("q", n, [7], temperature=each) for n, each in enumerate(temperatures)])
    with pytest.raises(ValueError, match=named):
        compare_policies(policy, policy, outputs, exact())
