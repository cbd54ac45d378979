"""A process model without a checker of steps: its labels are what becomes of each step, and what lacks them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flows.config import IterativeRLConfig, RewardModelPlan
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import use_store
from stages.tables import RewardLabels, Rewards, Rollouts, StepPrefixes
from tests.flows.short_runs import BASE, Run, copied, train

PROCESS: dict[str, Any] = {"models": [{"kind": "process"}], "trunk": "initial_policy"}
PLAN = PROCESS | {
    "questions": 24,
    "step_labels": {"kind": "monte_carlo", "samples": 2, "outputs_per_question": 3},
    "training": {
        "questions_per_update": 12,
        "training": {"precision": "fp32", "threads": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}},
    },
    "scoring": {"precision": "fp32", "threads": 1},
    "gauges": {"resamples": 100},
    "held_out_questions": 0,
}
SUPERVISION = {"advantage.supervision": "process"}
STEPS = {"reward.components": [{"kind": "accuracy", "verifier": "exact"}, {"kind": "steps"}]}


@pytest.fixture(scope="module")
def run(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two iterations of one step; the rules read answers only, and rewards are those of steps."""
    store = copied(supervised.store, tmp_path_factory)
    yield train(store, "grpo", iterations=2, steps=1, reward_model=PLAN, **SUPERVISION)
    evict()


def test_step_labels_are_what_the_policy_of_the_iteration_makes_of_its_own_steps(run: Run) -> None:
    assert run.given("continue_outputs", "policy") == run.given("label_outputs", "policy")
    labelled = run.given("label_outputs", "outputs")
    assert run.given("continue_outputs", "outputs") == run.given("cut_into_prefixes", "outputs") == labelled
    continued = [d for d in run.given("score", "outputs") if d in run.made("continue_outputs")]
    assert continued == run.made("continue_outputs")
    judged = [
        made
        for made, of in zip(run.made("score"), run.given("score", "outputs"), strict=True)
        if of in run.made("continue_outputs")
    ]
    assert run.given("estimate_step_labels", "rewards") == judged
    assert run.given("train_reward_model", "labels")[0] == run.made("estimate_step_labels")[0]


@pytest.mark.claim("4.2 step labels")
def test_each_label_is_the_verdict_on_two_continuations_or_on_the_output(run: Run) -> None:
    with use_store(run.store):
        labels = RewardLabels(run.made("estimate_step_labels")[0]).rows()
        cut = StepPrefixes(run.made("cut_into_prefixes")[0]).rows()
        outputs = Rollouts(run.made("continue_outputs")[0]).rows()
        scored = next(
            made
            for made, of in zip(run.made("score"), run.given("score", "outputs"), strict=True)
            if of == run.made("continue_outputs")[0]
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


def test_the_process_models_rewards_of_steps_are_what_the_policy_learns_from(run: Run) -> None:
    assert run.given("combine_rewards", "scores") == run.made("score_outputs")
    assert run.given("estimate_advantages", "rewards") == run.made("combine_rewards")
    with use_store(run.store):
        assert all(row["step_rewards"] for row in Rewards(run.made("score_outputs")[0]).rows())
    # The rules have answers to hold its outputs against, and no steps.
    assert "rm/step_accuracy" not in run.points[1]
    assert "rm/auc" in run.points[1]


# ------------------------------------------------------------------------------------- refusals


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        BASE.override(changes)
    return str(caught.value)


def test_a_process_model_without_labels_of_steps_is_refused_before_anything_runs() -> None:
    message = refusal(reward_model=PROCESS)
    assert "reward_model.step_labels: no rule labels the steps that the process model learns from" in message
    assert "set reward_model.step_labels.kind=monte_carlo" in message
    BASE.override({"reward_model": PROCESS, "reward_model.step_labels.kind": "monte_carlo"})
    BASE.override({"reward_model": PROCESS, **STEPS})


def test_completions_that_no_model_learns_from_are_refused() -> None:
    with pytest.raises(ConfigError, match="monte_carlo labels steps, and no model learns from them"):
        RewardModelPlan.parse({"step_labels": {"kind": "monte_carlo"}})


def test_process_supervision_needs_steps_of_whatever_gives_the_rewards() -> None:
    assert "add a component of kind `steps` to reward.components" in refusal(**SUPERVISION)
    outcome = {"models": [{"kind": "outcome"}]}
    message = refusal(**SUPERVISION, **STEPS, reward_model=outcome)
    assert "the rewards are those of reward_model, which has an outcome model only" in message
    kept: IterativeRLConfig = BASE.override({**SUPERVISION, "reward_model": PLAN})
    assert kept.reward_model is not None
    assert kept.reward_model.step_labels.kind == "monte_carlo"
