"""Learned rewards in Algorithm 1: what the models of an iteration learn from, and whom the policy learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flows.algorithm.data import prepare_data
from flows.algorithm.models import base_model, initial_policy
from flows.algorithm.rewards import RewardModels, first_reward_models, train_on
from flows.algorithm.sampling import derived_seed
from flows.config import IterativeRLConfig, RewardModelPlan
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import RewardLabels, Rewards, Rollouts, StepPrefixes
from tests.flows.short_runs import BASE, Run, copied, train

SMALL = {"precision": "fp32", "threads": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}}
PLAN: dict[str, Any] = {
    "models": [{"kind": "outcome"}, {"kind": "process"}],
    "trunk": "initial_policy",
    "questions": 48,
    "training": {"questions_per_update": 12, "training": SMALL},
    "scoring": {"precision": "fp32", "threads": 1},
    "gauges": {"resamples": 100},
}
ACCURACY = {"kind": "accuracy", "verifier": "exact"}
STEPS = {"reward.components": [ACCURACY, {"kind": "steps"}, {"kind": "format", "weight": 0.25}]}


@pytest.mark.parametrize(("purpose", "expected"), [(7, 0x680B699C), ("drift", 0x3213E56F), ("labels/1", 0x1B7DC114)])
def test_a_seed_is_31_bits_of_the_hash_of_run_and_purpose(purpose: object, expected: int) -> None:
    assert derived_seed(3, purpose) == expected


# ------------------------------------------------------------------------------------- rules, then models of them


@pytest.fixture(scope="module")
def run(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two iterations of one step, rewards by an outcome and a process model."""
    store = copied(supervised.store, tmp_path_factory)
    yield train(store, "grpo", iterations=2, steps=1, reward_model=PLAN, **STEPS)
    evict()


def models_of(run: Run) -> list[list[str]]:
    """The reward models that each step's outputs were scored with; other outputs are scored to see how the models age."""
    learned_from = run.given("combine_rewards", "scores")
    scored = [record for record in run.of("score_outputs") if record["result"] in learned_from]
    return [[part["artifact"] for part in record["arguments"]["models"]] for record in scored]


@pytest.mark.claim("the reward model refreshed too early", "line 11")
@pytest.mark.slow
def test_the_policy_of_an_iteration_learns_from_the_models_of_the_one_before(run: Run) -> None:
    trained = run.made("train_reward_model")
    assert len(trained) == 4  # two models, before the first iteration and after it; none after the last
    assert models_of(run) == [trained[:2], trained[2:]]
    assert run.given("estimate_advantages", "rewards") == run.made("combine_rewards")
    assert run.given("train_reward_model", "model")[2:] == trained[:2]  # continued, not begun anew


@pytest.mark.claim("5.2.1 model")
@pytest.mark.slow
def test_labels_are_the_rules_on_outputs_of_the_policy_as_it_was(run: Run) -> None:
    assert run.given("label_outputs", "policy") == [run.supervised, run.made("update_policy")[0]]


@pytest.mark.claim("4.1.4 replay")
@pytest.mark.slow
def test_replay_joins_a_tenth_of_history_from_the_second_training_on(run: Run) -> None:
    (mixed,) = run.of("mix_with_history")
    with use_store(run.store):
        fresh, rows = (RewardLabels(d).read().num_rows for d in (run.made("label_outputs")[1], mixed["result"]))
    assert rows - fresh == round(fresh / 9)  # 10 % of the mixture


@pytest.mark.claim("5.2.1 model")
@pytest.mark.slow
def test_rewards_are_the_models_and_the_rules_stay_as_components(run: Run) -> None:
    with use_store(run.store):
        rewards = Rewards(run.given("estimate_advantages", "rewards")[0]).rows()
    assert {row["scorer"] for row in rewards} == {"+".join(models_of(run)[0])}
    assert all(dict(row["components"])["rule"] in (0.0, 1.0) and row["step_rewards"] for row in rewards)
    formal = [dict(row["components"])["format"] for row in rewards]
    assert 0 < sum(formal) < len(formal)
    for row in rewards:
        said = dict(row["components"])
        assert row["reward"] == pytest.approx(said["model"] + 0.25 * said["format"])


@pytest.mark.slow
def test_every_step_shows_how_far_the_models_can_be_trusted(run: Run) -> None:
    assert all({"rm/auc", "rm/pearson", "rm/step_accuracy"} <= run.points[step].keys() for step in (1, 2))


@pytest.mark.slow
def test_a_gauge_beyond_its_limit_stops_the_run_and_names_it(run: Run) -> None:
    with (
        use_store(run.store),
        pytest.raises(ValueError, match="scores no longer agree with the rules: pearson"),
    ):
        train(
            run.store, "grpo", iterations=1, steps=1, reward_model=PLAN | {"limits": {"min_correlation": 1.0}}, **STEPS
        )


@pytest.mark.slow
def test_models_are_measured_on_outputs_of_the_old_and_the_new_policy(run: Run) -> None:
    measured = [
        {key.rpartition("/")[2] for key in run.points[step] if key.startswith("rm/held_out_accuracy/")}
        for step in (0, 1, 2)
    ]
    both = {f"{model}_{policy}" for model in ("old_model", "new_model") for policy in ("old_policy", "new_policy")}
    # No second policy before the first iteration, no second model after the last.
    assert measured == [{"old_model_old_policy"}, both, {"old_model_old_policy", "old_model_new_policy"}]


# ------------------------------------------------------------------------------------- labels of steps


PROCESS: dict[str, Any] = {"models": [{"kind": "process"}], "trunk": "initial_policy"}
COMPLETED = (
    PLAN
    | PROCESS
    | {
        "questions": 24,
        "step_labels": {"kind": "monte_carlo", "samples": 2, "outputs_per_question": 3},
        "held_out_questions": 0,
    }
)
SUPERVISION = {"advantage.supervision": "process"}


@pytest.fixture(scope="module")
def completed(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two iterations of one step; the rules read answers only, and rewards are those of steps."""
    store = copied(supervised.store, tmp_path_factory)
    yield train(store, "grpo", iterations=2, steps=1, reward_model=COMPLETED, **SUPERVISION)
    evict()


def test_step_labels_are_what_the_policy_makes_of_its_own_steps(completed: Run) -> None:
    assert completed.given("continue_outputs", "policy") == completed.given("label_outputs", "policy")
    labelled = completed.given("label_outputs", "outputs")
    assert completed.given("continue_outputs", "outputs") == completed.given("cut_into_prefixes", "outputs") == labelled
    continued = [d for d in completed.given("score", "outputs") if d in completed.made("continue_outputs")]
    assert continued == completed.made("continue_outputs")
    verdicts = [
        made
        for made, of in zip(completed.made("score"), completed.given("score", "outputs"), strict=True)
        if of in completed.made("continue_outputs")
    ]
    assert completed.given("estimate_step_labels", "rewards") == verdicts
    assert completed.given("train_reward_model", "labels")[0] == completed.made("estimate_step_labels")[0]


@pytest.mark.claim("4.2 step labels")
def test_each_label_is_the_verdict_on_two_continuations_or_on_the_output(completed: Run) -> None:
    with use_store(completed.store):
        labels = RewardLabels(completed.made("estimate_step_labels")[0]).rows()
        cut = StepPrefixes(completed.made("cut_into_prefixes")[0]).rows()
        outputs = Rollouts(completed.made("continue_outputs")[0]).rows()
        scored = next(
            made
            for made, of in zip(completed.made("score"), completed.given("score", "outputs"), strict=True)
            if of == completed.made("continue_outputs")[0]
        )
        right = {(row["question_id"], row["sample"]): row["status"] == "ok" for row in Rewards(scored).rows()}
    assert (
        len(outputs)
        == len(right)
        == 2 * len({(row["question_id"], row["prefix"]) for row in cut if row["prefix"] is not None})
    )
    expected: dict[tuple[str, int], list[float]] = {}
    own = {(row["question_id"], row["sample"]): row["label"] for row in labels}
    for row in cut:
        key, first = (row["question_id"], row["sample"]), 2 * (row["prefix"] or 0)
        known = own[key] if row["prefix"] is None else any(right[key[0], first + n] for n in (0, 1))
        expected.setdefault(key, []).append(float(known))
    assert {(r["question_id"], r["sample"]): r["step_labels"] for r in labels if r["step_labels"]} == expected
    assert {row["sample"] for row in labels if row["step_labels"]} == {0, 1, 2}
    assert {row["sample"] for row in labels} == {0, 1, 2, 3}


def test_the_process_models_rewards_of_steps_are_what_the_policy_learns_from(completed: Run) -> None:
    assert completed.given("combine_rewards", "scores") == completed.made("score_outputs")
    assert completed.given("estimate_advantages", "rewards") == completed.made("combine_rewards")
    with use_store(completed.store):
        assert all(row["step_rewards"] for row in Rewards(completed.made("score_outputs")[0]).rows())
    # The rules have answers to hold its outputs against, and no steps.
    assert "rm/step_accuracy" not in completed.points[1]
    assert "rm/auc" in completed.points[1]


# ------------------------------------------------------------------------------------- nothing to learn


TRAINING = {"questions_per_update": 24, "training": SMALL}


@pytest.fixture(scope="module")
def opened(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that holds the supervised policy."""
    with use_store(copied(supervised.store, tmp_path_factory)) as store:
        yield store
    evict()


def config(*, answers: str = "hashes", **plan: Any) -> IterativeRLConfig:
    """A rule that looks for answers by one convention; nothing is right where it is not the policy's."""
    rule = ACCURACY | {"conventions": [answers]}
    few = {"models": [{"kind": "outcome"}], "questions": 24, "replay": {"share": 0.0}, "training": TRAINING}
    return BASE.override({"reward.components": [rule], "reward_model": PLAN | few | plan})


def trained(checked: IterativeRLConfig) -> RewardModels:
    """The first models."""
    data = prepare_data(checked.data)
    base = base_model(checked, data)
    return first_reward_models(checked, data, base, initial_policy(checked, data, base))


def retrained(checked: IterativeRLConfig, first: RewardModels, *, iteration: int = 1) -> RewardModels:
    """The models after an iteration, asked about the initial policy's outputs again."""
    data = prepare_data(checked.data)
    policy = initial_policy(checked, data, base_model(checked, data))
    return train_on(checked, data, policy, first, iteration=iteration)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(
    ("objective", "reason"),
    [("pointwise", "all 96 labels are 0"), ("bradley_terry", r"no question has both .* \(0 of 96 are right\)")],
)
def test_a_model_stays_where_all_labels_are_equal_and_else_learns_on(objective: str, reason: str) -> None:
    plan = {"training": TRAINING | {"objective": {"kind": objective}}}
    first = trained(config(**plan))
    with pytest.warns(UserWarning, match=f"outcome reward model stays as it was after iteration 1: {reason}"):
        stayed = retrained(config(answers="boxed", **plan), first)
    assert stayed.models == first.models
    assert len(stayed.history) == 2  # what was labelled may be replayed later
    learned = retrained(config(**plan), first).models
    assert [model.content for model in learned] != [model.content for model in first.models]


@pytest.mark.usefixtures("opened")
def test_the_first_training_fails_where_all_labels_are_equal() -> None:
    with pytest.raises(ValueError, match="all 96 labels are 0; a reward model would learn a constant"):
        trained(config(answers="boxed"))


# ------------------------------------------------------------------------------------- refusals


RULES = {"reward.components": [ACCURACY, {"kind": "steps"}]}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        BASE.override(changes)
    return str(caught.value)


def test_a_process_model_without_labels_of_steps_is_refused() -> None:
    message = refusal(reward_model=PROCESS)
    assert "reward_model.step_labels: no rule labels the steps that the process model learns from" in message
    assert "set reward_model.step_labels.kind=monte_carlo" in message
    BASE.override({"reward_model": PROCESS, "reward_model.step_labels.kind": "monte_carlo"})
    BASE.override({"reward_model": PROCESS, **RULES})


def test_completions_that_no_model_learns_from_are_refused() -> None:
    with pytest.raises(ConfigError, match="monte_carlo labels steps, and no model learns from them"):
        RewardModelPlan.parse({"step_labels": {"kind": "monte_carlo"}})


def test_process_supervision_needs_steps_of_whatever_gives_the_rewards() -> None:
    assert "add a component of kind `steps` to reward.components" in refusal(**SUPERVISION)
    outcome = {"models": [{"kind": "outcome"}]}
    message = refusal(**SUPERVISION, **RULES, reward_model=outcome)
    assert "the rewards are those of reward_model, which has an outcome model only" in message
    kept: IterativeRLConfig = BASE.override({**SUPERVISION, "reward_model": COMPLETED})
    assert kept.reward_model is not None
    assert kept.reward_model.step_labels.kind == "monte_carlo"


def test_two_models_of_one_kind_and_pairs_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most one of each kind"):
        RewardModelPlan.parse({"models": [{"kind": "outcome"}, {"kind": "outcome"}]})
    with pytest.raises(ConfigError, match="a process model needs pointwise"):
        RewardModelPlan.parse({"models": [{"kind": "process"}], "training": {"objective": {"kind": "bradley_terry"}}})
