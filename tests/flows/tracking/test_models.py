"""What is registered of a run: policies at the end, reward models as they are trained; and which run is the best of its arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.runs.ledger import Ledger
from flows.tracking.fold import ModelsAndData, policies_of
from pipeline.events import DriftDone, RunEnded, RunStarted, StageDone, StepDone
from pipeline.store import Store
from pipeline.tracking.records import Record, model
from tests.flows.experiments.figures.made_up import curves, experiment
from tests.pipeline.calls import call


def ended(**changes: Any) -> RunEnded:
    return RunEnded("finished", 1.0, policy="f" * 64, **changes)


def ledger(**policies: str) -> Ledger:
    return Ledger(steps={int(step[1:]): {"update_policy": digest} for step, digest in policies.items()})


def test_the_best_policy_is_registered_where_it_is_not_the_final_one() -> None:
    found = policies_of(
        ended(best={"in": (2, 0.75), "out": (4, 0.5)}, final={"in": {"accuracy": 0.5, "greedy_accuracy": 0.1}}),
        ledger(s2="b" * 64, s4="f" * 64),
        {"arm": "x"},
    )
    assert found == [
        model("policy", "b" * 64, 2, {"arm": "x", "which": "best", "accuracy.in": "0.7500"}),
        model("policy", "f" * 64, 4, {"arm": "x", "which": "final", "accuracy.in": "0.5000"}),
    ]


@pytest.mark.parametrize("best", [{}, {"in": (0, 0.9)}, {"in": (4, 0.9)}])
def test_a_best_policy_that_is_the_final_or_the_first_is_registered_once(best: Any) -> None:
    found = policies_of(ended(best=best), ledger(s2="b" * 64, s4="f" * 64), {})
    assert [(made["digest"], made["tags"]["which"]) for made in found] == [("f" * 64, "final")]


def created(store: Store) -> StageDone:
    """The model that is trained first, as the store has it."""
    store.record(
        "c" * 64, call("0" * 64, stage="create_reward_model", arguments={"config": {"config": {"kind": "process"}}})
    )
    return StageDone("create_reward_model", "c" * 64, "0" * 64, 1.0, cached=True)


def trained(store: Store, digest: str, loss: float) -> StageDone:
    """The end of a training that continues the one before, as the store has it."""
    key, before = digest[::-1], {"1": "0" * 64, "2": "1" + "a" * 63, "3": "2" + "a" * 63}[digest[0]]
    metrics = {"rm/loss": loss, "rm/pairs": 9}
    store.record(
        key, call(digest, stage="train_reward_model", arguments={"model": {"artifact": before}}, metrics=metrics)
    )
    return StageDone("train_reward_model", key, digest, 1.0, cached=True)


def measured(store: Store, step: int, **aucs: float) -> DriftDone:
    """The measure of reward models on held-out outputs, as the store has it."""
    made = {which: f"{step}{number}".ljust(64, "e") for number, which in enumerate(aucs)}
    for which, key in made.items():
        store.record(key, call("9" * 64, stage="measure_reward_model", metrics={"rm/auc": aucs[which]}))
    return DriftDone(step, made)


def test_reward_models_are_registered_with_their_auc_on_held_out_outputs(store: Store) -> None:
    logged: list[Record] = []
    models = ModelsAndData(logged.append)
    first, second, third = ("1" + "a" * 63, "2" + "a" * 63, "3" + "a" * 63)
    start = RunStarted("r", "study", 4, 2, "", "", "here", 1, "0", params={"seed": "3"}, tags={"arm": "orm"})
    for event in (
        start,
        created(store),
        trained(store, first, 0.5),
        measured(store, 0, old_model_old_policy=0.875),
        StepDone(2, 0, {}),
        trained(store, second, 0.25),
        measured(store, 2, old_model_new_policy=0.5, new_model_new_policy=0.75),
        StepDone(4, 1, {}),
        trained(store, third, 0.125),  # and not measured
    ):
        models.take(event)
    models.conclude(ended(), ledger())
    *found, policy = logged
    assert [(made["model"], made["digest"], made["step"]) for made in found] == [
        ("reward-model", first, 0),
        ("reward-model", second, 2),
        ("reward-model", third, 4),
    ]
    tags = [
        {name: made["tags"].get(name) for name in ("arm", "seed", "kind", "iteration", "loss", "held_out_auc")}
        for made in found
    ]
    assert tags == [
        {"arm": "orm", "seed": "3", "kind": "process", "iteration": "0", "loss": "0.5", "held_out_auc": "0.8750"},
        {"arm": "orm", "seed": "3", "kind": "process", "iteration": "1", "loss": "0.25", "held_out_auc": "0.7500"},
        {"arm": "orm", "seed": "3", "kind": "process", "iteration": "2", "loss": "0.125", "held_out_auc": None},
    ]
    assert policy["model"] == "policy"


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
