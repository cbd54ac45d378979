"""Log-probabilities under fixed policies: by hand from all logits, exactly equal where policies are equal."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.residency import _residents, evict
from pipeline.store import Store
from stages.logprobs import LogprobsConfig, compare_policies, score_reference
from stages.models import WEIGHTS, Checkpoint, load_model
from stages.tables import Advantages, ReferenceLogprobs, Rollouts
from stages.training import AdamWConfig, LoRAConfig, TrainingConfig
from stages.training.adapters import load_trainable
from stages.training.loop import publish, resident_engine
from stages.update import DPOConfig, GRPOConfig, UpdateConfig, update_policy
from tests.stages.rows import advantage_row, rollout_row
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


@pytest.mark.claim("on-policy distillation")
@pytest.mark.parametrize("adapter", [None, LoRAConfig(r=4)])
def test_a_teacher_of_another_size_is_scored_as_it_is(store: Store, adapter: LoRAConfig | None) -> None:
    policy, teacher = tiny_checkpoint(), tiny_checkpoint("llama", hidden_size=64, num_hidden_layers=3)
    outputs, how = Rollouts.write(output_rows()), exact(training=exact().training.override({"adapter": adapter}))
    plain = score_reference(teacher, outputs, exact()).rows()
    found = compare_policies(policy, teacher, outputs, how).rows()
    assert [row["reference"] for row in found] == [row["reference"] for row in plain]
    assert found[0]["policy"] != found[0]["reference"]


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


SLOW = pytest.mark.slow


def update_config(**changes: Any) -> UpdateConfig:
    return UpdateConfig(objective=GRPOConfig(beta=0.5), training=exact().training).override(changes)


def pass_config(update: UpdateConfig) -> LogprobsConfig:
    return LogprobsConfig(micro_batch_tokens=update.micro_batch_tokens, training=update.training)


def advantages(*, masked: int | None = None) -> Advantages:
    rows = output_rows()
    return Advantages.write(
        [
            advantage_row(
                row["question_id"], row["sample"], None if number == masked else [value] * len(row["output_ids"])
            )
            for number, row in enumerate(rows)
            for value in [1.0 - number % 3]
        ]
    )


def three_updates(policy: Checkpoint, config: UpdateConfig, learned: Advantages, *, staged: bool) -> Checkpoint:
    """Each learns from the same outputs; the reference is the policy before the first."""
    reference, outputs = policy, Rollouts.write(output_rows())
    evict()
    for seed in range(3):
        scored = (
            score_reference(reference, outputs, pass_config(config)) if staged and policy != reference else reference
        )
        policy = update_policy(policy, scored, outputs, learned, config, seed=seed)
    return policy


def twin(policy: Checkpoint) -> Checkpoint:
    """Equal weights under another digest: no shortcut knows that they are equal."""

    def fill(folder: Any) -> None:
        skipped = shutil.ignore_patterns("manifest.json")
        shutil.copytree(policy.path, folder, copy_function=shutil.copyfile, ignore=skipped, dirs_exist_ok=True)
        (folder / "note.txt").write_text("the same weights")

    return Checkpoint.write(fill)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=SLOW), "bf16"])
def test_values_are_bit_for_bit_those_of_a_comparison_with_the_policy(store: Store, precision: str) -> None:
    reference, outputs = tiny_checkpoint(), Rollouts.write(output_rows())
    how = exact(training=exact().training.override({"precision": precision}), micro_batch_tokens=30)
    inline = compare_policies(trained(reference), reference, outputs, how).rows()
    single = score_reference(reference, outputs, how).rows()
    assert [(row["question_id"], row["sample"]) for row in single] == [(f"q{n // 3}", n % 3) for n in range(7)]
    assert [row["reference"] for row in single] == [row["reference"] for row in inline]


@pytest.mark.claim("a reference of another time or precision")
@pytest.mark.parametrize("tokens", [pytest.param(16384, marks=SLOW), 30])
def test_three_updates_are_the_same_with_the_reference_scored_before(store: Store, tokens: int) -> None:
    config = update_config(micro_batch_tokens=tokens)
    inline = three_updates(tiny_checkpoint(), config, advantages(), staged=False)
    staged = three_updates(tiny_checkpoint(), config, advantages(), staged=True)
    assert inline.metrics["policy/kl"] > 0
    assert staged.content == inline.content


@SLOW
@pytest.mark.parametrize("changes", [{"mini_batches": 2}, {"mu": 2}, {}])
def test_where_micro_batches_differ_three_updates_agree_to_1e_6(store: Store, changes: dict[str, int]) -> None:
    config, learned = update_config(micro_batch_tokens=30, **changes), advantages(masked=None if changes else 2)
    inline = three_updates(tiny_checkpoint(), config, learned, staged=False)
    staged = three_updates(tiny_checkpoint(), config, learned, staged=True)
    one, other = (load_file(checkpoint.path / WEIGHTS) for checkpoint in (inline, staged))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.claim("a reference of another time or precision")
@pytest.mark.parametrize(
    "changes", [{}, *(pytest.param(each, marks=SLOW) for each in ({"training.precision": "bf16"}, {"mini_batches": 2}))]
)
def test_an_equal_reference_has_a_kl_of_exactly_zero_however_it_is_asked(store: Store, changes: dict[str, Any]) -> None:
    policy, outputs, config = tiny_checkpoint(), Rollouts.write(output_rows()), update_config(**changes)
    # A learning rate below every weight's resolution: also at the second mini-batch the policy is the reference.
    config = config.override({"training.optimizer.learning_rate": 1e-30})
    equal = twin(policy)
    own = update_policy(policy, policy, outputs, advantages(), config, seed=0)
    inline = update_policy(policy, equal, outputs, advantages(), config, seed=0)
    assert own.metrics["policy/kl"] == inline.metrics["policy/kl"] == 0.0
    assert own.content == inline.content
    if not changes.get("mini_batches"):
        before = update_policy(
            policy, score_reference(equal, outputs, pass_config(config)), outputs, advantages(), config, seed=0
        )
        assert before.metrics["policy/kl"] == 0.0


@SLOW
def test_a_pass_serves_every_objective_that_reads_the_reference(store: Store) -> None:
    reference, outputs = tiny_checkpoint(), Rollouts.write(output_rows()[:2])
    policy, config = trained(reference), update_config()
    scored = score_reference(reference, outputs, pass_config(config))
    pairs = [
        advantage_row(row["question_id"], row["sample"], [1.0 - 2 * row["sample"]] * len(row["output_ids"]), pair=0)
        for row in outputs.rows()
    ]
    for objective in (DPOConfig(), GRPOConfig(beta=0.5, divergence="k2")):
        other = config.override({"objective": objective.model_dump(mode="json")})
        results = [
            update_policy(policy, given, outputs, Advantages.write(pairs), other, seed=0)
            for given in (reference, scored)
        ]
        assert results[0].content == results[1].content, objective.kind
        first = [
            update_policy(reference, given, outputs, Advantages.write(pairs), other, seed=0)
            for given in (reference, twin(reference))
        ]
        assert first[0].content == first[1].content, objective.kind


def test_the_reference_of_an_iteration_is_loaded_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(checkpoint: Checkpoint, *args: Any) -> Any:
        loaded.append(checkpoint.digest)
        return load_trainable(checkpoint, *args)

    monkeypatch.setattr("stages.training.loop.load_trainable", load)
    first, rows = tiny_checkpoint(), output_rows()
    second = twin(first)
    passes = [score_reference(each, Rollouts.write(rows[: 2 + n]), exact()) for n, each in enumerate((first, first))]
    score_reference(second, Rollouts.write(rows), exact())
    assert loaded == [first.digest, second.digest]
    assert passes[1].rows()[:2] == passes[0].rows()
    evict()
    assert score_reference(first, Rollouts.write(rows[:4]), exact()).rows()[:3] == passes[1].rows()


@SLOW
def test_the_update_keeps_no_tensors_of_a_reference_that_was_asked_before(store: Store) -> None:
    reference, outputs, config = tiny_checkpoint(), Rollouts.write(output_rows()), update_config()
    policy = trained(reference)
    scored = score_reference(reference, outputs, pass_config(config))
    alive = []
    for given in (scored, reference):
        evict()
        alive.append(update_policy(policy, given, outputs, advantages(), config, seed=0).metrics["memory/tensors_mb"])
    size = sum(tensor.nbytes for tensor in load_file(reference.path / WEIGHTS).values()) / 2**20
    assert alive[1] - alive[0] == pytest.approx(size, rel=0.2)


def test_values_of_other_outputs_are_refused_by_row(store: Store) -> None:
    policy, rows, config = tiny_checkpoint(), output_rows(), update_config()
    scored = score_reference(policy, Rollouts.write(rows), pass_config(config)).rows()
    outputs = Rollouts.write(rows)
    with pytest.raises(ValueError, match=r"reference log-probabilities .* without a row, first \('q2', 0\)"):
        update_policy(policy, ReferenceLogprobs.write(scored[:-1]), outputs, advantages(), config, seed=0)
    scored[1]["reference"] = [*scored[1]["reference"], -1.0]
    length = len(rows[1]["output_ids"])
    with pytest.raises(
        ValueError, match=rf"\('q0', 1\): expected {length} reference log-probabilities, .* found {length + 1}"
    ):
        update_policy(policy, ReferenceLogprobs.write(scored), outputs, advantages(), config, seed=0)


def test_a_reference_on_the_base_of_a_trained_adapter_needs_no_model(store: Store) -> None:
    """Scored and compared through the trainer's model; to the bit what the base alone says."""
    start, outputs = tiny_checkpoint(), Rollouts.write(output_rows())
    expected = [row["reference"] for row in score_reference(start, outputs, exact()).rows()]
    evict()
    training = exact().training.model_copy(update={"adapter": LoRAConfig(r=4)})
    engine = resident_engine(start, training)
    update(engine, random_rows(4, seed=1))
    policy = publish(engine)
    scored = score_reference(start, outputs, exact(training=training)).rows()
    compared = compare_policies(policy, start, outputs, exact(training=training)).rows()
    assert "reference" not in _residents
    assert [row["reference"] for row in scored] == [row["reference"] for row in compared] == expected
    assert [row["policy"] for row in compared] != expected
