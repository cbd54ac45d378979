"""The critic made from a policy, asked for values and fitted to returns; its gradient compared with that of a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.residency import evict
from pipeline.store import Store
from stages.critic import CriticConfig, create_critic, estimate_values, update_critic
from stages.join import JoinError
from stages.kernels.advantage import gae
from stages.models import Checkpoint, load_model, load_optimizer_state, load_tokenizer, load_trainer_state
from stages.tables import Advantages, Rollouts
from stages.training import DeepSpeedEngineConfig
from stages.training.batching import deal
from stages.update.stage import join
from tests.stages.critic.worlds import exact, exploration, outspoken_critic, tables, tiny_critic
from tests.stages.rows import rollout_row
from tests.stages.training.tiny import changed, random_rows, tiny_checkpoint, update
from tests.stages.update.exact import gradient_of, relative


def loss_by_definition(model: Any, outputs: Rollouts, advantages: Advantages) -> torch.Tensor:
    """Row by row, without padding or batching: mean over outputs of the mean over tokens of 1/2 (V - return)^2."""
    total, rows = torch.zeros(()), 0
    for row, target in zip(outputs.rows(), advantages.rows(), strict=True):
        if target["advantage"] is None:
            continue
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        value = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1, 0]
        total = total + 0.5 * (value - torch.tensor(target["returns"])).square().mean()
        rows += 1
    return total / rows


def gradient_by_definition(critic: Checkpoint, outputs: Rollouts, advantages: Advantages) -> torch.Tensor:
    model = load_model(critic, dtype=torch.float32)
    loss_by_definition(model, outputs, advantages).backward()
    return gradient_of(model)


def gradient_of_stage(
    critic: Checkpoint, outputs: Rollouts, advantages: Advantages, config: CriticConfig
) -> torch.Tensor:
    """The gradient the stage used, read from AdamW's first moment: m = (1 - beta_1) g after one step."""
    evict()
    state = load_optimizer_state(update_critic(critic, outputs, advantages, config, seed=0))
    model = load_model(critic, dtype=torch.float32)
    return torch.cat([state[f"{name}/exp_avg"].flatten() for name, _ in model.named_parameters()]) / (1 - 0.9)


def with_a_masked_row() -> tuple[Rollouts, Advantages]:
    outputs, advantages = exploration()
    advantages[1] |= {"advantage": None, "returns": None}
    return Rollouts.write(outputs), Advantages.write(advantages)


@pytest.mark.claim("4.1.1 critic")
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_mean_squared_error(store: Store, masked: bool) -> None:
    critic, (outputs, advantages) = outspoken_critic(), with_a_masked_row() if masked else tables()
    found = gradient_of_stage(critic, outputs, advantages, exact())
    expected = gradient_by_definition(critic, outputs, advantages)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_mini_batches_are_the_policys_questions_each_with_its_own_mean(store: Store, seed: int) -> None:
    critic, (outputs, advantages) = outspoken_critic(), exploration()
    config = exact(mini_batches=2, learning_rate=1e-12)  # both gradients are then of one critic
    made = update_critic(critic, Rollouts.write(outputs), Advantages.write(advantages), config, seed=seed)
    state, model = load_optimizer_state(made), load_model(critic, dtype=torch.float32)
    found = torch.cat([state[f"{name}/exp_avg"].flatten() for name, _ in model.named_parameters()])
    joined = join(Rollouts.write(outputs), Advantages.write(advantages))  # as the policy's update does it
    first, second = (hand[0].question_id for hand in deal(joined, mini_batches=2, seed=seed))
    assert {first, second} == {"q0", "q1"}
    gradients = [
        gradient_by_definition(
            critic,
            *(
                type_.write([row for row in rows if row["question_id"] == question])
                for type_, rows in ((Rollouts, outputs), (Advantages, advantages))
            ),
        )
        for question in (first, second)
    ]
    expected = 0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]  # m after two steps
    assert relative(found, expected) < 1e-5
    assert load_trainer_state(made)["updates"] == 2


def test_a_mini_batch_whose_every_output_is_masked_is_a_skipped_step(store: Store) -> None:
    critic, (outputs, advantages) = outspoken_critic(), exploration()
    for row in advantages[3:]:
        row |= {"advantage": None, "returns": None}
    tables = Rollouts.write(outputs), Advantages.write(advantages)
    made = update_critic(critic, *tables, exact(mini_batches=2, mu=2), seed=0)
    assert made.metrics["critic/skipped_steps"] == 2
    assert load_trainer_state(made)["updates"] == 2


def test_the_gradient_does_not_depend_on_micro_batches(store: Store) -> None:
    critic, (outputs, advantages) = outspoken_critic(), tables()
    whole = gradient_of_stage(critic, outputs, advantages, exact(micro_batch_tokens=10_000))
    parts = gradient_of_stage(critic, outputs, advantages, exact(micro_batch_tokens=12))
    assert relative(parts, whole) < 1e-6


def test_metrics_are_those_of_the_critic_before_its_update(store: Store) -> None:
    critic, (outputs, advantages) = outspoken_critic(), tables()
    metrics = update_critic(critic, outputs, advantages, exact(), seed=0).metrics
    values = [row["value"] for row in estimate_values(critic, outputs, exact()).rows()]
    returns = [row["returns"] for row in advantages.rows()]
    weight = np.concatenate([[1 / len(row)] * len(row) for row in returns])  # as in the loss: outputs weigh alike

    def mean(numbers: np.ndarray) -> float:
        return float(np.average(numbers, weights=weight))

    value, target = np.concatenate(values), np.concatenate(returns)
    assert metrics["critic/value_mean"] == pytest.approx(mean(value), abs=1e-6)
    assert metrics["critic/return_mean"] == pytest.approx(mean(target), abs=1e-6)
    error = target - value
    expected = 1 - mean((error - mean(error)) ** 2) / mean((target - mean(target)) ** 2)
    assert metrics["critic/explained_variance"] == pytest.approx(expected, abs=1e-5)
    loss = loss_by_definition(load_model(critic, dtype=torch.float32), outputs, advantages)
    assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradient = gradient_by_definition(critic, outputs, advantages)
    assert metrics["critic/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert metrics["critic/learning_rate"] == 1e-2
    assert metrics["memory/critic_mb"] > 0


def test_a_critic_that_says_zero_explains_nothing_and_a_learned_one_most(store: Store) -> None:
    outputs, advantages = tables()
    critic, explained, losses = tiny_critic(), [], []
    for seed in range(4):
        critic = update_critic(critic, outputs, advantages, exact(mu=20), seed=seed)
        explained.append(critic.metrics["critic/explained_variance"])
        losses.append(critic.metrics["critic/loss"])
    assert explained[0] == pytest.approx(0.0, abs=1e-12)
    # Not all: the outputs of a question have one value before their first token, and returns of their own.
    assert explained[-1] > 0.7
    assert losses[-1] < 0.3 * losses[0]  # means over the stage's passes


def test_mu_passes_are_mu_updates(store: Store) -> None:
    outputs, advantages = tables()
    start = tiny_critic()
    twice = update_critic(start, outputs, advantages, exact(mu=2), seed=0)
    once = update_critic(start, outputs, advantages, exact(), seed=0)
    assert update_critic(once, outputs, advantages, exact(), seed=0).content == twice.content


def test_values_come_from_the_engine_that_was_updated(store: Store) -> None:
    outputs, advantages = tables()
    updated = update_critic(tiny_critic(), outputs, advantages, exact(), seed=0)
    warm = estimate_values(updated, outputs, exact())
    evict()
    # The same values from the artifact, by another call of the stage: its key knows the config.
    assert estimate_values(updated, outputs, exact(mu=5)) == warm


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (None, "advantage.kind = gae"),
        ([1.0] * 9, "found 9"),
        ([math.nan], "nan at token 0"),
        ([math.inf], "inf at token 0"),
    ],
)
def test_returns_that_cannot_be_fitted_are_refused_by_row(
    store: Store, returns: list[float] | None, message: str
) -> None:
    outputs, advantages = exploration()
    changed = returns * len(outputs[1]["output_ids"]) if returns is not None and len(returns) == 1 else returns
    advantages[1] |= {"returns": changed}
    with pytest.raises(ValueError, match=rf"\('q0', 1\).*{message}"):
        update_critic(tiny_critic(), Rollouts.write(outputs), Advantages.write(advantages), exact(), seed=0)


def test_advantages_of_other_rollouts_are_refused_by_key(store: Store) -> None:
    _, advantages = tables()
    other = Rollouts.write([rollout_row("elsewhere", 0, [6])])
    with pytest.raises(JoinError) as refused:
        update_critic(tiny_critic(), other, advantages, exact(), seed=0)
    assert (refused.value.table, refused.value.missing) == ("advantages", ("elsewhere", 0))


def test_a_step_without_outputs_leaves_the_critic_as_it_is_and_warns(store: Store) -> None:
    outputs, rows = exploration()
    masked = Advantages.write([row | {"advantage": None, "returns": None} for row in rows])
    critic = tiny_critic()
    with pytest.warns(UserWarning, match="every output of a step is masked out"):
        assert update_critic(critic, Rollouts.write(outputs), masked, exact(), seed=0) == critic


def test_returns_of_gae_without_values_are_the_rewards_to_go(store: Store) -> None:
    # The loop closes: V = 0, a reward of 1 at the end, no discount: every return is 1, whatever lambda, and is learned.
    outputs, rows = exploration()
    critic = tiny_critic()
    values = estimate_values(critic, Rollouts.write(outputs), exact()).rows()
    for row, value in zip(rows, values, strict=True):
        reward = [0.0] * (len(value["value"]) - 1) + [1.0]
        row["returns"] = gae([reward], [value["value"]], [[1] * len(reward)], gamma=1.0, lam=1.0).return_BT[0].tolist()
        assert set(row["returns"]) == {1.0}
    metrics = update_critic(critic, Rollouts.write(outputs), Advantages.write(rows), exact(), seed=0).metrics
    assert metrics["critic/loss"] == pytest.approx(0.5)
    assert "critic/explained_variance" not in metrics  # returns without variance have no share of it


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_under_deepspeed_policy_and_critic_are_trained_side_by_side(store: Store, stage: int) -> None:
    from stages.training.loop import publish, resident_engine

    outputs, advantages = tables()
    engine_config = DeepSpeedEngineConfig(zero_stage=stage).model_dump()
    config = exact(training=exact().training.override({"engine": engine_config}))
    rows = random_rows(4)

    def train(*, policy: bool, critic: bool) -> tuple[str, str]:
        evict()
        policy_content, valued = "", create_critic(tiny_checkpoint(), exact())
        engine = resident_engine(tiny_checkpoint(), config.training) if policy else None
        for seed in range(2):
            if engine is not None:
                update(engine, rows)
                policy_content = publish(engine).content
            if critic:  # a seed of its own for each setting, so that no update is found in the store
                valued = update_critic(valued, outputs, advantages, config, seed=10 * stage + seed + 100 * policy)
        return policy_content, valued.content

    # Two engines of one process do not disturb each other: both end in the bits of each by itself.
    both = train(policy=True, critic=True)
    assert both == (train(policy=True, critic=False)[0], train(policy=False, critic=True)[1])


@pytest.mark.claim("4.1.1 critic")
@pytest.mark.parametrize("tied", [True, False])
def test_the_trunk_is_the_policys_and_its_output_head_stays_behind(store: Store, tied: bool) -> None:
    policy = tiny_checkpoint(tie_word_embeddings=tied)
    critic = create_critic(policy, exact())
    theirs, ours = (load_file(point.path / "model.safetensors") for point in (policy, critic))
    assert set(ours) - set(theirs) == {"score.weight", "score.bias"}
    assert set(theirs) - set(ours) == (set() if tied else {"lm_head.weight"})
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items() if name != "lm_head.weight")
    assert critic.metrics["critic/parameters"] == sum(tensor.numel() for tensor in ours.values())
    assert load_tokenizer(critic).eos_token == "1"
    # Before the first update every value is zero.
    assert {value for row in estimate_values(critic, tables()[0], exact()).rows() for value in row["value"]} == {0.0}


@pytest.mark.parametrize("architecture", ["llama", "olmo"])
def test_llama_has_a_token_classifier_and_olmo_is_refused(store: Store, architecture: str) -> None:
    policy = tiny_checkpoint(architecture, tie_word_embeddings=False)
    if architecture == "olmo":
        with pytest.raises(ValueError, match="AutoModelForTokenClassification of architecture olmo"):
            create_critic(policy, exact())
        return
    assert (
        type(load_model(create_critic(policy, exact()), dtype=torch.float32)).__name__ == "LlamaForTokenClassification"
    )


def test_plain_transformers_loads_it_and_computes_the_same_values(store: Store) -> None:
    from transformers import AutoModelForTokenClassification

    outputs, _ = tables()
    critic = outspoken_critic()
    plain = AutoModelForTokenClassification.from_pretrained(critic.path)
    plain.train()  # nothing drops out, in this mode either
    assert plain.config.id2label == {0: "value"}
    for row, values in zip(outputs.rows(), estimate_values(critic, outputs, exact()).rows(), strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        expected = plain(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1, 0]
        assert values["value"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_one_policy_makes_one_critic(store: Store) -> None:
    policy = tiny_checkpoint()
    # Another config is another call of the stage; what it makes is the same.
    assert create_critic(policy, exact()).digest == create_critic(policy, exact(mu=2)).digest


def values_of(critic: Checkpoint, rows: list[dict[str, Any]], **changes: Any) -> list[list[float]]:
    return [row["value"] for row in estimate_values(critic, Rollouts.write(rows), exact(**changes)).rows()]


@pytest.mark.claim("off by one")
def test_a_value_does_not_know_its_token_nor_what_follows(store: Store) -> None:
    critic = outspoken_critic()
    one, other = (values_of(critic, [rollout_row("q", 0, ids)])[0] for ids in ([7, 8, 9, 10], [7, 8, 20, 21]))
    # The third token differs: the value before it and all earlier ones are the same, the value after it is not.
    assert one[:3] == pytest.approx(other[:3], abs=1e-6)
    assert abs(one[3] - other[3]) > 1e-3


@pytest.mark.claim("a score read at the wrong last token")
def test_the_first_value_is_that_of_the_question_alone(store: Store) -> None:
    critic = outspoken_critic()
    ((first, *_), (single,)) = values_of(critic, [rollout_row("q", 0, [7, 8, 9]), rollout_row("q", 1, [20])])
    assert first == pytest.approx(single, abs=1e-6)


def test_rows_keep_their_key_order_and_length(store: Store) -> None:
    outputs, _ = tables()
    found = estimate_values(outspoken_critic(), outputs, exact()).rows()
    shapes = [(row["question_id"], row["sample"], len(row["output_ids"])) for row in outputs.rows()]
    assert [(row["question_id"], row["sample"], len(row["value"])) for row in found] == shapes


def test_a_row_has_the_same_values_in_any_micro_batch(store: Store) -> None:
    critic = outspoken_critic()
    rows, _ = exploration()
    whole = values_of(critic, rows, micro_batch_tokens=10_000)
    for tokens in (1, 20):
        for found, expected in zip(values_of(critic, rows, micro_batch_tokens=tokens), whole, strict=True):
            assert found == pytest.approx(expected, abs=1e-6)


def test_in_bfloat16_the_head_still_computes_in_float32(store: Store) -> None:
    critic = outspoken_critic()
    rows, _ = exploration()
    training = exact().training.override({"precision": "bf16"})
    (first, *_) = values_of(critic, rows, training=training)
    # A bfloat16 has 8 significant bits, zeros below them.
    assert any(torch.tensor(value).bfloat16().item() != value for value in first)


def test_a_value_that_is_not_finite_is_refused_by_its_row(store: Store) -> None:
    # The embedding of one token, which comes before the last token of the second row only.
    critic = changed(outspoken_critic(), lambda weights: weights["model.embed_tokens.weight"][25].fill_(math.nan))
    rows = [rollout_row("a", 0, [7, 8]), rollout_row("a", 1, [25, 8])]
    with pytest.raises(ValueError, match=r"\('a', 1\)"):
        estimate_values(critic, Rollouts.write(rows), exact())
