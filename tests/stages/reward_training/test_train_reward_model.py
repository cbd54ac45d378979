"""Training of reward models: gradients against plain loops, what is refused, and that an interrupted run is no other run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.residency import evict
from pipeline.store import Store
from stages.models import Checkpoint, load_model, load_optimizer_state, load_trainer_state
from stages.reward_model import ScoringConfig, score_outputs
from stages.reward_training import (
    BradleyTerryConfig,
    PointwiseConfig,
    RewardTrainingConfig,
    nothing_to_learn,
    train_reward_model,
)
from stages.tables import RewardLabels
from stages.training import DeepSpeedEngineConfig
from tests.stages.reward_training.worlds import (
    EOS,
    RIGHT,
    base_with_pad_as_eos,
    exact,
    label_rows,
    labels,
    outputs_of,
    outspoken,
    tiny_reward_model,
)
from tests.stages.training.tiny import VOCABULARY, tiny_checkpoint

ALL, MATCHED, POINTWISE = BradleyTerryConfig(), BradleyTerryConfig(pairs="matched"), PointwiseConfig()
ALIKE = BradleyTerryConfig(average="pairs")
CASES: list[tuple[Any, Any]] = [
    ("outcome", ALL),
    ("outcome", ALIKE),
    ("outcome", MATCHED),
    ("outcome", POINTWISE),
    ("process", POINTWISE),
]


def logits_of(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """A score at every output token, by trunk and head: no batch, no padding, no pooling."""
    ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
    logits: torch.Tensor = model.score(model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]
    return logits[len(row["prompt_ids"]) :]


def loss_by_definition(model: Any, rows: list[dict[str, Any]], objective: Any) -> torch.Tensor:
    kind = type(model).__name__
    if kind.endswith("ForTokenClassification"):
        outputs = []
        for row in rows:
            scores = logits_of(model, row)[row["step_ends"]]
            outputs.append(binary_cross_entropy_with_logits(scores, torch.tensor(row["step_labels"])))
        return torch.stack(outputs).mean()
    scores = [logits_of(model, row)[-1] for row in rows]
    if objective == POINTWISE:
        return torch.stack([-logsigmoid(s if row["label"] else -s) for s, row in zip(scores, rows, strict=True)]).mean()
    losses = []
    for _, group in itertools.groupby(zip(scores, rows, strict=True), key=lambda pair: pair[1]["question_id"]):
        members = list(group)
        right, wrong = ([s for s, row in members if row["label"] == label] for label in (1.0, 0.0))
        pairs = zip(right, wrong, strict=False) if objective == MATCHED else itertools.product(right, wrong)
        found = [-logsigmoid(preferred - other) for preferred, other in pairs]
        # The 1 / (K choose 2) of each question (Ouyang et al. 2022, Eq. 1), or every pair alike.
        losses += found if objective.average == "pairs" or not found else [torch.stack(found).mean()]
    return torch.stack(losses).mean()


def gradient_by_definition(model: Checkpoint, rows: list[dict[str, Any]], objective: Any) -> torch.Tensor:
    loaded = load_model(model, dtype=torch.float32)
    loss_by_definition(loaded, rows, objective).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in loaded.parameters()])


def gradient_of_stage(model: Checkpoint, table: RewardLabels, config: RewardTrainingConfig) -> torch.Tensor:
    """The gradient the stage used, read from AdamW's first moment: m = (1 - beta_1) g after one step."""
    evict()
    state = load_optimizer_state(train_reward_model(model, table, config, seed=0))
    loaded = load_model(model, dtype=torch.float32)
    return torch.cat([state[f"{name}/exp_avg"].flatten() for name, _ in loaded.named_parameters()]) / (1 - 0.9)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.linalg.vector_norm(found - expected) < 2e-6 * torch.linalg.vector_norm(expected))


@pytest.mark.claim("preference pairs in place of rule labels")
@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_the_gradient_is_that_of_the_loss_as_it_is_written(store: Store, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    model = outspoken(kind, base)
    found = gradient_of_stage(model, labels(base), exact(objective=objective))
    assert close(found, gradient_by_definition(model, label_rows(base), objective))


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_the_gradient_does_not_depend_on_micro_batches(store: Store, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    model, table = outspoken(kind, base), labels(base)
    whole = gradient_of_stage(model, table, exact(objective=objective, micro_batch_tokens=10_000))
    parts = gradient_of_stage(model, table, exact(objective=objective, micro_batch_tokens=20))
    assert close(parts, whole)


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_equal_outputs_count_as_often_as_they_occur(store: Store, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    model, rows = outspoken(kind, base), label_rows(base)
    again = [{**row, "sample": row["sample"] + 10} for row in rows if row["sample"] in (0, 2)]
    rows = sorted(
        [*rows, *again, *({**row, "sample": row["sample"] + 20} for row in again)], key=lambda r: r["question_id"]
    )
    found = gradient_of_stage(model, RewardLabels.write(rows), exact(objective=objective))
    assert close(found, gradient_by_definition(model, rows, objective))


@pytest.mark.claim("a score read at the wrong last token")
@pytest.mark.parametrize("objective", [ALL, POINTWISE])
def test_the_scored_token_is_the_named_one_where_padding_is_the_end_of_sequence(store: Store, objective: Any) -> None:
    base = base_with_pad_as_eos()
    rows = label_rows(base)
    for row in rows:  # an end of sequence within the output too, as a chat template may have it
        row["output_ids"][0] = EOS
    model = outspoken("outcome", base)
    found = gradient_of_stage(model, RewardLabels.write(rows), exact(objective=objective))
    assert close(found, gradient_by_definition(model, rows, objective))


def test_the_index_in_the_table_decides_where_the_score_is_read(store: Store) -> None:
    base = tiny_checkpoint()
    model, rows = outspoken("outcome", base), label_rows(base)
    for row in rows:
        row["scored_index"] -= 1
    found = gradient_of_stage(model, RewardLabels.write(rows), exact())
    shorter = [{**row, "output_ids": row["output_ids"][:-1]} for row in rows]
    assert close(found, gradient_by_definition(model, shorter, POINTWISE))


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_metrics_are_those_of_the_model_before_its_update(store: Store, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    model = outspoken(kind, base)
    metrics = train_reward_model(model, labels(base), exact(objective=objective), seed=0).metrics
    loss = loss_by_definition(load_model(model, dtype=torch.float32), label_rows(base), objective)
    assert metrics["rm/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["rm/grad_norm"] == pytest.approx(
        float(gradient_by_definition(model, label_rows(base), objective).norm()), rel=1e-5
    )
    assert metrics["rm/updates"] == 1
    assert metrics["rm/learning_rate"] == 1e-2
    pairs = sum(len(right) * (4 - len(right)) for right in RIGHT)
    matched = sum(min(len(right), 4 - len(right)) for right in RIGHT)
    assert metrics["rm/pairs"] == (pairs if objective in (ALL, ALIKE) else matched if objective == MATCHED else 0)
    assert metrics["rm/examples"] == (16 if objective == POINTWISE else 12)  # all samples of one question are right


def test_training_accuracy_counts_pairs_in_order(store: Store) -> None:
    base = tiny_checkpoint()
    model, rows = outspoken("outcome", base), label_rows(base)
    loaded = load_model(model, dtype=torch.float32)
    scores = [(row["question_id"], row["label"], logits_of(loaded, row)[-1].item()) for row in rows]
    pairs = [(q, s > t) for q, y, s in scores for p, z, t in scores if q == p and y > z]
    metrics = train_reward_model(model, labels(base), exact(objective=ALIKE), seed=0).metrics
    assert metrics["rm/train_accuracy"] == pytest.approx(sum(hit for _, hit in pairs) / len(pairs))
    metrics = train_reward_model(model, labels(base), exact(objective=ALL), seed=0).metrics
    shares = [[hit for q, hit in pairs if q == question] for question in dict.fromkeys(q for q, _ in pairs)]
    assert metrics["rm/train_accuracy"] == pytest.approx(sum(sum(hits) / len(hits) for hits in shares) / len(shares))
    metrics = train_reward_model(model, labels(base), exact(), seed=0).metrics
    assert metrics["rm/train_accuracy"] == pytest.approx(sum((s > 0) == (y == 1) for _, y, s in scores) / len(scores))


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_labels_are_learned(store: Store, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    config = exact(objective=objective, epochs=50, learning_rate=1e-2)
    model = train_reward_model(tiny_reward_model(kind, base), labels(base), config, seed=0)
    assert model.metrics["rm/train_accuracy"] == pytest.approx(1.0)
    assert model.metrics["rm/loss"] < 0.1
    rows = label_rows(base)
    scores = score_outputs(outputs_of(rows), base, [model], ScoringConfig(precision="fp32", threads=1)).rows()
    if kind == "process":
        right = [[score > 0 for score in row["step_rewards"]] for row in scores]
        assert right == [[label == 1 for label in row["step_labels"]] for row in rows]
    elif objective == POINTWISE:
        assert [row["reward"] > 0 for row in scores] == [row["label"] == 1 for row in rows]


def test_an_update_has_all_outputs_of_its_questions(store: Store) -> None:
    base = tiny_checkpoint()
    model = tiny_reward_model("outcome", base)
    assert train_reward_model(model, labels(base), exact(questions_per_update=3), seed=0).metrics["rm/updates"] == 2
    config = exact(questions_per_update=1, epochs=2, objective=ALL)
    # One question has no pair: there are three to learn from.
    assert train_reward_model(model, labels(base), config, seed=0).metrics["rm/updates"] == 6


def test_the_rate_falls_within_a_training_and_begins_anew_with_the_next(store: Store) -> None:
    base = tiny_checkpoint()
    config = exact(questions_per_update=2, epochs=2)  # four updates: the last at a quarter of the rate
    first = train_reward_model(tiny_reward_model("outcome", base), labels(base), config, seed=0)
    assert first.metrics["rm/learning_rate"] == pytest.approx(0.25e-2)
    second = train_reward_model(first, labels(base), exact(), seed=0)
    assert second.metrics["rm/learning_rate"] == pytest.approx(1e-2)
    constant = train_reward_model(first, labels(base), config.override({"decay": "none"}), seed=0)
    assert constant.metrics["rm/learning_rate"] == pytest.approx(1e-2)


def test_the_seed_orders_the_questions(store: Store) -> None:
    base = tiny_checkpoint()
    model, table, config = tiny_reward_model("outcome", base), labels(base), exact(questions_per_update=1)
    contents = [train_reward_model(model, table, config, seed=seed).content for seed in (0, 1)]
    assert contents[0] != contents[1]
    evict()
    other = exact(questions_per_update=1, micro_batch_tokens=16383)  # another call of the stage, the same computation
    assert train_reward_model(model, table, other, seed=0).content == contents[0]


@pytest.mark.slow
def test_a_warm_engine_and_a_cold_one_give_the_same_bits(store: Store) -> None:
    base = tiny_checkpoint()
    table = labels(base)

    def two_rounds(*, cold: bool) -> Checkpoint:
        model = tiny_reward_model("outcome", base)
        config = exact(questions_per_update=2, micro_batch_tokens=16384 + cold)  # so that nothing is found in the store
        for seed in (0, 1):
            if cold:
                evict()
            model = train_reward_model(model, table, config, seed=seed)
        return model

    assert two_rounds(cold=True).content == two_rounds(cold=False).content


@pytest.mark.parametrize("state", ["carry", "none"])
def test_the_moments_are_kept_or_begun_anew_and_the_updates_count_on(store: Store, state: str) -> None:
    base = tiny_checkpoint()
    config = exact().override({"training.optimizer_state": state})
    once = train_reward_model(tiny_reward_model("outcome", base), labels(base), config, seed=0)
    twice = train_reward_model(once, labels(base), config, seed=1)
    assert load_trainer_state(twice)["updates"] == 2
    assert {float(v) for k, v in load_optimizer_state(twice).items() if k.endswith("/step")} == (
        {2.0} if state == "carry" else set()
    )
    assert (twice.path / "optimizer.safetensors").exists() is (state == "carry")


def with_labels(label: Any) -> Any:
    """A change of every row's label to what a function makes of its question."""
    return lambda rows: [{**row, "label": float(label(row["question_id"]))} for row in rows]


def with_row(place: int, **changes: Any) -> Any:
    return lambda rows: [row | changes if number == place else row for number, row in enumerate(rows)]


ALL_RIGHT, ALL_WRONG = with_labels(lambda question: True), with_labels(lambda question: False)
BY_QUESTION = with_labels(lambda question: question == "q1")
"""Labels that differ, and no pair."""


def without_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "step_ends": None, "step_labels": None} for row in rows]


@pytest.mark.claim("a reward model given other ids")
@pytest.mark.parametrize(
    ("kind", "objective", "change", "found"),
    [
        ("outcome", ALL, ALL_RIGHT, "16 of 16 are right.*objective.kind=pointwise"),
        ("outcome", POINTWISE, ALL_RIGHT, "all 16 labels are 1"),
        ("outcome", POINTWISE, lambda rows: [], "has no rows"),
        ("process", POINTWISE, without_steps, "has no step labels.*`steps`"),
        ("process", ALL, list, "objective.kind=pointwise"),
        ("outcome", POINTWISE, with_row(5, output_ids=[7] * 14), r"\('q1', 1\): 3 prompt \+ 14 output .* 17.* 16"),
        ("outcome", POINTWISE, with_row(2, vocabulary="f" * 64), r"\('q0', 2\) .*ffffffffffff"),
        ("outcome", POINTWISE, with_row(2, output_ids=[VOCABULARY, 1], scored_index=1), rf"\('q0', 2\) .*{VOCABULARY}"),
        ("outcome", POINTWISE, with_row(1, scored_index=40), r"\('q0', 1\).*\[40\]"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_its_row(
    store: Store, kind: Any, objective: Any, change: Any, found: str
) -> None:
    base = tiny_checkpoint(max_position_embeddings=16)
    table = RewardLabels.write(change(label_rows(base)))
    with pytest.raises(ValueError, match=found):
        train_reward_model(tiny_reward_model(kind, base), table, exact(objective=objective), seed=0)


@pytest.mark.parametrize("change", [list, lambda rows: [], ALL_RIGHT, ALL_WRONG, BY_QUESTION, without_steps])
@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_what_training_would_refuse_for_its_labels_is_known_beforehand(
    store: Store, change: Any, kind: Any, objective: Any
) -> None:
    base = tiny_checkpoint()
    table, model = RewardLabels.write(change(label_rows(base))), tiny_reward_model(kind, base)
    if nothing_to_learn(table, kind, objective) is None:
        assert load_trainer_state(train_reward_model(model, table, exact(objective=objective), seed=0))["updates"] == 1
        return
    with pytest.raises(ValueError, match=r"no question has both|labels are|nothing to train"):
        train_reward_model(model, table, exact(objective=objective), seed=0)


def test_labels_that_differ_between_questions_only_teach_a_pointwise_model(store: Store) -> None:
    table = RewardLabels.write(BY_QUESTION(label_rows(tiny_checkpoint())))
    assert nothing_to_learn(table, "outcome", POINTWISE) is None
    assert nothing_to_learn(table, "outcome", ALL) is not None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("kind", "objective"), [("outcome", ALL), ("process", POINTWISE)])
def test_under_deepspeed_the_gradient_is_that_of_torch(store: Store, stage: Any, kind: Any, objective: Any) -> None:
    base = tiny_checkpoint()
    model = outspoken(kind, base)
    engine = DeepSpeedEngineConfig(zero_stage=stage)
    config = exact(objective=objective, micro_batch_tokens=40)
    config = config.override({"training.engine": engine.model_dump()})
    found = gradient_of_stage(model, labels(base), config)
    assert close(found, gradient_by_definition(model, label_rows(base), objective))
