"""Retraining of reward models where a policy has become right, or wrong, on every question it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flows.algorithm.data import prepare_data
from flows.algorithm.models import base_model, initial_policy
from flows.algorithm.rewards import RewardModels, first_reward_models, train_on
from flows.config import IterativeRLConfig
from pipeline.residency import evict
from pipeline.store import Store, use_store
from tests.flows.short_runs import BASE, Run, copied

TRAINING = {"precision": "fp32", "threads": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}}
PLAN = {
    "models": [{"kind": "outcome"}],
    "trunk": "initial_policy",
    "questions": 24,
    "training": {"questions_per_update": 24, "training": TRAINING},
    "replay": {"share": 0.0},
}


@pytest.fixture(scope="module")
def store(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that holds the supervised policy."""
    with use_store(copied(supervised.store, tmp_path_factory)) as opened:
        yield opened
    evict()


def config(*, answers: str = "hashes", **plan: Any) -> IterativeRLConfig:
    """A rule that looks for answers by one convention; nothing is right where it is not the policy's."""
    rule = {"kind": "accuracy", "verifier": "exact", "conventions": [answers]}
    return BASE.override({"reward.components": [rule], "reward_model": PLAN | plan})


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


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("objective", "reason"),
    [("pointwise", "all 96 labels are 0"), ("bradley_terry", r"no question has both .* \(0 of 96 are right\)")],
)
def test_a_model_stays_where_all_labels_are_equal_and_learns_on_where_they_differ(objective: str, reason: str) -> None:
    plan = {"training": PLAN["training"] | {"objective": {"kind": objective}}}
    first = trained(config(**plan))
    with pytest.warns(UserWarning, match=f"outcome reward model stays as it was after iteration 1: {reason}"):
        stayed = retrained(config(answers="boxed", **plan), first)
    assert stayed.models == first.models
    assert len(stayed.history) == 2  # what was labelled may be replayed later
    assert retrained(config(**plan), first).models != first.models


@pytest.mark.usefixtures("store")
def test_the_first_training_fails_where_all_labels_are_equal() -> None:
    with pytest.raises(ValueError, match="all 96 labels are 0; a reward model would learn a constant"):
        trained(config(answers="boxed"))
