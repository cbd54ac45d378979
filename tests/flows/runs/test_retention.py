"""What a run keeps: freed as it goes, nothing that is still needed, and the same bits as without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.config.recipes import arithmetic_smoke
from flows.runs.paths import Places
from flows.runs.record import run_folder
from flows.runs.retention import KeepConfig
from flows.runs.upkeep import Forecast
from flows.storage.gc import Records, step_tables
from pipeline.events import StepDone
from pipeline.store import PrunedArtifactError, Store, use_store
from pipeline.store.files import DiskWatch
from stages.models import Checkpoint, load_optimizer_state
from tests.flows.toy_training import ALL, kept, train

FEW = KeepConfig(checkpoints=2, optimizer=1, rollouts=2)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """A listener that fails warns, and the run goes on: here it must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.scale
def test_the_newest_the_evaluated_and_starts_of_iterations_stay(store: Store) -> None:
    run = train(store, FEW, iterations=2, steps=4, every=3)
    # Evaluated: 3, 6 and 8, the last. Step 4 is the second iteration's reference. Steps 7 and 8 are the newest two.
    states = ["nothing", "nothing", "weights", "weights", "nothing", "weights", "weights", "all"]
    assert [kept(store, digest) for digest in run.policies] == states
    for step, made in run.ledger.steps.items():
        for stage in ("rollout", "score", "estimate_advantages"):
            # Outputs of step 1 are those of the initial policy.
            assert kept(store, made[stage]) == ("all" if step in (1, 7, 8) else "nothing"), (step, stage)
    for evaluation in run.ledger.evaluations:
        assert {kept(store, digest) for digest in evaluation.artifacts.values()} == {"all"}


def test_the_tables_of_a_step_are_those_of_every_turn_and_of_the_calls() -> None:
    def call(stage: str, result: str, **given: str) -> dict[str, Any]:
        return {"stage": stage, "result": result, "arguments": {name: {"artifact": of} for name, of in given.items()}}

    calls = [
        call("rollout", "o1", policy="p", questions="q"),
        call("answer_calls", "c1", outputs="o1", questions="q"),
        call("continue_dialogues", "o2", policy="p", outputs="o1", calls="c1"),
    ]
    update = call("update_policy", "p2", policy="p", outputs="o2")
    assert step_tables(update, Records(calls), lambda policy: policy == "p") == {"o1", "c1", "o2"}
    assert step_tables(update, Records(calls), lambda _: False) == set()


@pytest.mark.scale
def test_outputs_that_were_sampled_ahead_are_freed_with_their_own_step(store: Store) -> None:
    run = train(store, FEW, overlap=True)
    assert (run.executed["rollout"], run.ledger.steps.keys()) == (6 + 2, set(range(1, 7)))
    for step, made in run.ledger.steps.items():
        for stage in ("rollout", "score", "estimate_advantages"):
            # Those of steps 1 and 2 are the initial policy's.
            assert kept(store, made[stage]) == ("all" if step in (1, 2, 5, 6) else "nothing"), (step, stage)


@pytest.mark.scale
def test_a_run_that_frees_has_the_digests_of_one_that_keeps_all(tmp_path: Path) -> None:
    store, plain = Store(tmp_path / "few"), Store(tmp_path / "all")
    run, whole = train(store, FEW, iterations=2), train(plain, iterations=2)
    assert run.policies == whole.policies
    assert [store.manifest(name)["digest"] for name in run.policies] == [
        plain.manifest(name)["digest"] for name in whole.policies
    ]
    again = train(Store(store.root), FEW, iterations=2)
    assert (again.policy, again.executed) == (whole.policy, {})


@pytest.mark.scale
def test_a_longer_run_goes_on_from_the_newest_and_computes_the_new_steps_only(tmp_path: Path) -> None:
    store, plain = Store(tmp_path / "few"), Store(tmp_path / "all")
    train(store, FEW, steps=5)
    longer, whole = train(Store(store.root), FEW, steps=8), train(plain, steps=8)
    assert longer.policies == whole.policies
    assert longer.executed["update_policy"] == 3
    assert [kept(store, digest) for digest in longer.policies] == ["nothing"] * 6 + ["weights", "all"]


@pytest.mark.scale
def test_what_keep_frees_is_the_same_whether_the_steps_were_computed_or_reused(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "late"), Store(tmp_path / "at once")
    late = train(store)
    train(Store(store.root), FEW)
    at_once = train(other, FEW)
    assert [kept(store, d) for d in late.policies] == [kept(other, d) for d in at_once.policies]


@pytest.mark.scale
def test_offline_outputs_of_the_initial_policy_stay_for_the_arms_to_come(store: Store) -> None:
    run = train(store, FEW, offline=True)
    assert {kept(store, made["rollout"]) for made in run.ledger.steps.values()} == {"all"}
    assert kept(store, run.policies[1]) == "nothing"


@pytest.mark.scale
def test_what_another_live_run_holds_stays_until_that_has_ended(store: Store) -> None:
    other = Store(store.root)
    first = train(store, steps=3)
    with other.pins.open("other"), use_store(other):
        held = Checkpoint(first.policies[0])
        assert held.path
        run = train(Store(store.root), KeepConfig(checkpoints=1), steps=4)
        assert [kept(store, digest) for digest in run.policies] == ["all", "nothing", "nothing", "all"]
    assert run.retention is not None
    run.retention.take(StepDone(5, 0, {}))
    assert kept(store, run.policies[0]) == "nothing"


@pytest.mark.scale
def test_what_other_runs_have_recorded_is_spared(store: Store) -> None:
    first = train(store, steps=3)
    run = train(Store(store.root), FEW, steps=6, spared={*first.policies, first.ledger.steps[2]["rollout"]})
    assert [kept(store, digest) for digest in run.policies] == ["all", "all", "all", "nothing", "weights", "all"]
    assert kept(store, first.ledger.steps[2]["rollout"]) == "all"
    assert kept(store, first.ledger.steps[2]["score"]) == "nothing"


@pytest.mark.scale
def test_training_on_without_the_optimizer_state_is_refused(store: Store) -> None:
    run = train(store, steps=3)
    assert store.prune(run.policy, ["optimizer.safetensors"]) == 800
    message = f"its optimizer state was pruned to free space; `cohort forget {run.policy[:12]}` and the same run again"
    with use_store(store), pytest.raises(PrunedArtifactError, match=message):
        load_optimizer_state(Checkpoint(run.policy))
    with pytest.raises(PrunedArtifactError, match=message):
        train(Store(store.root), steps=4)
    with use_store(store):
        assert (Checkpoint(run.policy).path / "model.safetensors").exists()  # and whoever needs no more goes on


@pytest.mark.scale
def test_a_payload_that_is_computed_again_is_whole_again(store: Store) -> None:
    run = train(store, steps=3)
    store.prune(run.policy, ["optimizer.safetensors"])
    store.forget(run.policy)
    again = train(Store(store.root), steps=3)
    assert (again.policy, again.executed) == (run.policy, {"update_policy": 1})
    assert kept(store, run.policy) == "all"
    assert not (store.root / "quarantine").exists() or not list((store.root / "quarantine").iterdir())


@pytest.mark.scale
def test_freeing_costs_no_more_in_a_late_step_than_in_an_early_one(store: Store) -> None:
    run = train(store, FEW, steps=40)
    assert run.retention is not None
    sizes = [len(run.retention._tables), len(run.retention._due), len(run.retention._calls)]
    assert sizes == [2, 0, 3]  # the last evaluation's calls
    assert {len(chain) for chain in (*run.retention._weights.values(), *run.retention._states.values())} == {1, 2}
    assert sum(kept(store, digest) == "nothing" for digest in run.policies) == 38


def test_what_is_kept_is_no_part_of_which_run_it_is(tmp_path: Path) -> None:
    config = arithmetic_smoke()
    other = config.override({"keep": {"optimizer": 1, "checkpoints": 3, "rollouts": 5, "min_free_gb": 7}})
    assert run_folder(Places(tmp_path), config) == run_folder(Places(tmp_path), other)
    assert "keep" not in other.identity()
    assert IterativeRLConfig.from_yaml(other.to_yaml()) == other


def forecast_of(keep: KeepConfig, free: int, steps: int) -> tuple[DiskWatch, Forecast]:
    watch = DiskWatch(Path(), 0, free=lambda folder: free)

    class Frees:
        freed = 0

    return watch, Forecast(watch, Frees(), keep, steps=steps)  # type: ignore[arg-type]


def test_a_run_that_will_not_fit_is_warned_of_once_and_one_that_fits_never() -> None:
    watch, forecast = forecast_of(ALL, free=700, steps=10)
    watch.written = 5000  # data and supervised fine-tuning count with the first step
    forecast.take(StepDone(1, 0, {}))
    watch.written += 100
    with pytest.warns(
        UserWarning, match="its last 8 steps take about 800 B, and 700 B can be written; keep.checkpoints"
    ):
        forecast.take(StepDone(2, 0, {}))
    watch.written += 100
    forecast.take(StepDone(3, 0, {}))  # a second warning would be an error here

    watch, forecast = forecast_of(ALL, free=800, steps=10)
    for step in (1, 2, 3):
        watch.written += 100
        forecast.take(StepDone(step, 0, {}))


def test_what_a_run_frees_is_no_part_of_the_forecast() -> None:
    watch, forecast = forecast_of(KeepConfig(checkpoints=3), free=300, steps=100)
    for step in range(1, 20):
        watch.written += 100
        if step > 3:
            forecast._retention.freed += 98
        forecast.take(StepDone(step, 0, {}))
    assert not forecast._warned
