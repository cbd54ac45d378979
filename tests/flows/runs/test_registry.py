"""What is registered of a run: policies at the end, reward models as they are trained; and which run is the best of its arm."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flows.config.recipes import arithmetic_smoke
from flows.runs.ledger import Ledger
from flows.runs.registry import Registrar, policies_of
from flows.runs.summary import Summary
from pipeline.events import DriftDone, StageDone, StepDone
from pipeline.store import Store
from pipeline.tracking import Tracker
from pipeline.tracking.registry import TrackedModel
from tests.flows.experiments.figures.made_up import curves, experiment
from tests.pipeline.calls import call


class Notes(Tracker):
    """A tracker that keeps what it is told of models."""

    def __init__(self) -> None:
        super().__init__(Path(), None)
        self.models: list[TrackedModel] = []

    def log_model(self, model: TrackedModel) -> None:
        self.models.append(model)


def summary(**changes: Any) -> Summary:
    empty: dict[str, Any] = {field.name: {} for field in fields(Summary)}
    return Summary(**(empty | {"name": "r", "steps": 4, "policy": "f" * 64} | changes))


def ledger(**policies: str) -> Ledger:
    return Ledger(steps={int(step[1:]): {"update_policy": digest} for step, digest in policies.items()})


def test_the_best_policy_is_registered_where_it_is_not_the_final_one() -> None:
    told = policies_of(
        summary(best={"in": (2, 0.75), "out": (4, 0.5)}, after={"in": {"accuracy": 0.5, "greedy_accuracy": 0.1}}),
        ledger(s2="b" * 64, s4="f" * 64),
        {"arm": "x"},
    )
    assert told == [
        TrackedModel("policy", "b" * 64, 2, {"arm": "x", "which": "best", "accuracy.in": "0.7500"}),
        TrackedModel("policy", "f" * 64, 4, {"arm": "x", "which": "final", "accuracy.in": "0.5000"}),
    ]


@pytest.mark.parametrize("best", [{}, {"in": (0, 0.9)}, {"in": (4, 0.9)}])
def test_a_best_policy_that_rl_did_not_make_or_that_is_the_final_one_is_not_registered_beside_it(best: Any) -> None:
    told = policies_of(summary(best=best), ledger(s2="b" * 64, s4="f" * 64), {})
    assert [(model.digest, model.tags["which"]) for model in told] == [("f" * 64, "final")]


def trained(store: Store, digest: str, loss: float) -> StageDone:
    """The end of a training, as the store has it."""
    key = digest[::-1]
    store.record(key, call(digest, stage="train_reward_model", metrics={"rm/loss": loss, "rm/pairs": 9}))
    return StageDone("train_reward_model", key, digest, 1.0, cached=True)


def measured(store: Store, step: int, **aucs: float) -> DriftDone:
    """The measure of reward models on held-out outputs, as the store has it."""
    made = {which: f"{step}{number}".ljust(64, "e") for number, which in enumerate(aucs)}
    for which, key in made.items():
        store.record(key, call("9" * 64, stage="measure_reward_model", metrics={"rm/auc": aucs[which]}))
    return DriftDone(step, made)


def test_reward_models_are_registered_when_trained_with_what_held_out_outputs_say_of_them(store: Store) -> None:
    notes = Notes()
    registrar = Registrar(notes, arithmetic_smoke(), {"arm": "orm"})
    first, second, third = ("1" + "a" * 63, "2" + "a" * 63, "3" + "a" * 63)
    for event in (
        trained(store, first, 0.5),
        measured(store, 0, old_model_old_policy=0.875),
        StepDone(2, 0, {}),
        trained(store, second, 0.25),
        measured(store, 2, old_model_new_policy=0.5, new_model_new_policy=0.75),
        StepDone(4, 1, {}),
        trained(store, third, 0.125),  # and not measured
    ):
        registrar.take(event)
    registrar.conclude(summary(), ledger())
    *models, policy = notes.models
    assert [(model.name, model.digest, model.step) for model in models] == [
        ("reward-model", first, 0),
        ("reward-model", second, 2),
        ("reward-model", third, 4),
    ]
    told = [{name: model.tags.get(name) for name in ("arm", "iteration", "loss", "held_out_auc")} for model in models]
    assert told == [
        {"arm": "orm", "iteration": "0", "loss": "0.5", "held_out_auc": "0.8750"},
        {"arm": "orm", "iteration": "1", "loss": "0.25", "held_out_auc": "0.7500"},
        {"arm": "orm", "iteration": "2", "loss": "0.125", "held_out_auc": None},
    ]
    assert policy.name == "policy"


def test_the_best_run_is_the_best_of_the_arm_with_the_best_mean(tmp_path: Path) -> None:
    runs = curves({"lucky": [[0.1, 0.9], [0.1, 0.2]], "steady": [[0.1, 0.6], [0.1, 0.7]]})
    result, _ = experiment(tmp_path, runs)
    best = result.best_run()
    assert best is not None
    assert (best.arm, best.seed) == ("steady", 1)


def test_an_arm_of_which_a_run_is_missing_is_not_the_best(tmp_path: Path) -> None:
    result, _ = experiment(tmp_path, curves({"whole": [[0.1, 0.5], [0.1, 0.5]], "half": [[0.1, 0.9], [0.1, 0.9]]}))
    lost = result.runs[-1].model_copy(update={"status": "failed", "final": {}})
    best = result.model_copy(update={"runs": (*result.runs[:-1], lost)}).best_run()
    assert best is not None
    assert (best.arm, best.seed) == ("whole", 0)
    nothing = [run.model_copy(update={"status": "not run", "final": {}}) for run in result.runs]
    assert result.model_copy(update={"runs": tuple(nothing)}).best_run() is None
