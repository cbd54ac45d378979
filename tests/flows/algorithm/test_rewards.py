"""Learned rewards in Algorithm 1: the model of an iteration is that of the one before, trained on with replay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.config import RewardModelPlan
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import use_store
from stages.tables import RewardLabels, Rewards
from tests.flows.short_runs import Run, copied, train

PLAN = {
    "models": [{"kind": "outcome"}, {"kind": "process"}],
    "trunk": "initial_policy",
    "questions": 48,
    "training": {
        "questions_per_update": 12,
        "training": {"precision": "fp32", "threads": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}},
    },
    "scoring": {"precision": "fp32", "threads": 1},
    "gauges": {"resamples": 100},
}
STEPS = {
    "reward.components": [
        {"kind": "accuracy", "verifier": "exact"},
        {"kind": "steps"},
        {"kind": "format", "weight": 0.25},
    ]
}


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
def test_rewards_are_the_models_and_the_rules_stay_beside_them(run: Run) -> None:
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


def test_two_models_of_one_kind_and_pairs_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most one of each kind"):
        RewardModelPlan.parse({"models": [{"kind": "outcome"}, {"kind": "outcome"}]})
    with pytest.raises(ConfigError, match="a process model needs pointwise"):
        RewardModelPlan.parse({"models": [{"kind": "process"}], "training": {"objective": {"kind": "bradley_terry"}}})


@pytest.mark.slow
def test_after_each_iteration_the_models_are_held_against_the_old_and_the_new_policys_outputs(run: Run) -> None:
    measured = [
        {key.rpartition("/")[2] for key in run.points[step] if key.startswith("rm/held_out_accuracy/")}
        for step in (0, 1, 2)
    ]
    both = {f"{model}_{policy}" for model in ("old_model", "new_model") for policy in ("old_policy", "new_policy")}
    # No second policy before the first iteration, no second model after the last.
    assert measured == [{"old_model_old_policy"}, both, {"old_model_old_policy", "old_model_new_policy"}]
