"""Outputs of the policy before the last update: which policy samples for which step, in turns with updates or updates them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from flows import iterative_rl as loop
from flows.algorithm import side_by_side
from flows.runs.ledger import Ledger
from pipeline.config import ConfigError
from pipeline.events import Event, StageDone, StageFailed, StageStarted, recording
from pipeline.residency import evict
from pipeline.store import Store
from pipeline.workers.group import WorkerError
from stages.rollout import apart
from tests.flows.short_runs import BASE, Run, copied, train

pytestmark = pytest.mark.slow

LAG: dict[str, Any] = {"overlap": 1, "update.old_logprobs": "rollout", "iterations": 2, "steps": 3}
OVERLAP = LAG | {"side_by_side": "never"}
CONCURRENT = LAG | {"side_by_side": "always"}
CORRECTED = OVERLAP | {"update.old_logprobs": "trainer", "update.correction": {"kind": "truncated"}}


@pytest.fixture(scope="module")
def store(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(supervised.store, tmp_path_factory)


@pytest.fixture(scope="module")
def seen() -> Ledger:
    """The ledger of the run."""
    return Ledger()


@pytest.fixture(scope="module")
def run(store: Store, seen: Ledger) -> Run:
    """Two iterations of three steps."""
    with recording(seen.take):
        made = train(store, "grpo", **OVERLAP)
    evict()
    return made


def samplers(run: Run) -> list[str]:
    """The policy that sampled the outputs of each update."""
    made = dict(zip(run.made("rollout"), run.given("rollout", "policy"), strict=True))
    return [made[outputs] for outputs in run.given("update_policy", "outputs")]


def test_a_step_learns_from_outputs_of_the_policy_before_the_last_update(run: Run) -> None:
    p = [run.supervised, *run.made("update_policy")]
    assert len(set(p)) == 7
    assert samplers(run) == [p[0], p[0], p[1], p[3], p[3], p[4]]
    assert run.given("update_policy", "policy") == p[:6]
    assert run.given("update_policy", "reference") == [p[0]] * 3 + [p[3]] * 3


def test_outputs_for_a_step_are_sampled_before_the_update_of_the_one_before(run: Run) -> None:
    order = [name for name, _ in run.calls if name in ("rollout", "update_policy")]
    two, one = ["rollout", "rollout", "update_policy"], ["rollout", "update_policy"]
    assert order == [*two, *one, "update_policy"] * 2


def test_ratios_are_those_to_the_policy_that_sampled(run: Run) -> None:
    """By float32 the engine's own log-probabilities differ from the trainer's by less than 1e-4."""
    for step in (1, 4):
        assert run.points[step]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    for step in (2, 3, 5, 6):
        assert run.points[step]["policy/ratio_max"] > 1.01
        assert run.points[step]["policy/ratio_min"] < 0.99


def test_each_step_of_the_log_names_the_outputs_that_it_learned_from(run: Run, seen: Ledger) -> None:
    assert [seen.steps[step]["rollout"] for step in range(1, 7)] == run.given("update_policy", "outputs")
    assert set(seen.current().calls) == {key for _, key in run.calls}
    assert len({key for _, key in run.calls}) == len(run.calls), "a call was counted as made and as reused"


def test_the_truncated_correction_weighs_by_what_the_update_between_did(store: Store) -> None:
    corrected = train(store, "grpo", **CORRECTED)
    for step in (1, 4):
        assert corrected.points[step]["policy/correction_mean"] == pytest.approx(1.0, abs=1e-4)
    for step in range(1, 7):
        assert corrected.points[step]["policy/ratio_min"] == corrected.points[step]["policy/ratio_max"] == 1.0
    assert abs(corrected.points[2]["policy/correction_mean"] - 1.0) > 1e-4
    assert corrected.points[2]["rollout/mismatch_kl"] > 100 * corrected.points[1]["rollout/mismatch_kl"]
    evict()


def test_without_a_lag_outputs_are_the_policys_own(run: Run, store: Store) -> None:
    plain = train(store, "grpo", iterations=2, steps=3)
    assert samplers(plain) == plain.given("update_policy", "policy")
    assert plain.executed["rollout"] == 5, "the first outputs of both are those of the supervised policy"
    evict()


def test_outputs_sampled_ahead_of_an_update_that_fails_are_reused(
    run: Run, supervised: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, update, count = copied(supervised.store, tmp_path_factory), loop.update_policy, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise FloatingPointError("of the second step")
        return update(*args, **kwargs)

    failed = Run(store)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update_policy", failing)
        with pytest.raises(FloatingPointError):
            train(store, "grpo", run=failed, **OVERLAP)
    evict()
    assert failed.executed["rollout"] == 3
    resumed = train(store, "grpo", **OVERLAP)
    assert resumed.content == run.content
    assert resumed.executed["rollout"] == 3
    assert resumed.executed["update_policy"] == 5
    assert resumed.calls == run.calls


def test_dynamic_sampling_draws_from_the_policy_before_the_last_update(store: Store) -> None:
    made = train(store, "dapo", **OVERLAP | {"iterations": 1})
    policies = set(made.given("rollout", "policy"))
    assert policies == {made.supervised, made.made("update_policy")[0]}
    assert made.executed["rollout"] > 3
    evict()


# ------------------------------------------------------------------------------------- side by side


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU with room for both sides, whatever this machine has; what they started is ended."""
    monkeypatch.setattr(side_by_side, "within_quota", lambda count: 2)
    monkeypatch.setattr(side_by_side, "has_cuda", lambda: False)
    yield
    evict()


@pytest.fixture
def fresh(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(supervised.store, tmp_path_factory)


@dataclass
class Seen:
    """The calls that started and ended, in their order."""

    events: list[tuple[str, str]] = field(default_factory=list)
    sampled: threading.Event = field(default_factory=threading.Event)
    """Set when outputs were recorded."""

    def take(self, event: Event) -> None:
        if isinstance(event, StageStarted | StageDone | StageFailed):
            self.events.append((type(event).__name__, event.stage))
        if isinstance(event, StageDone) and event.stage == "rollout":
            self.sampled.set()


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("written", ["auto", 100])
def test_side_by_side_has_the_digests_of_in_turns(run: Run, fresh: Store, written: Any) -> None:
    seen = Seen()
    with recording(seen.take):
        made = train(fresh, "grpo", **CONCURRENT | {"checkpoint.every": written})
    assert (made.digest, made.content) == (run.digest, run.content)
    assert set(made.calls) == set(run.calls)
    assert [made.made(stage) for stage in ("rollout", "update_policy")] == [
        run.made(stage) for stage in ("rollout", "update_policy")
    ]
    assert made.executed == run.executed
    assert [made.points[step]["rollout/concurrent"] for step in range(1, 7)] == [0, 1, 1] * 2
    assert [run.points[step]["rollout/concurrent"] for step in range(1, 7)] == [0] * 6
    updates = [place for place, event in enumerate(seen.events) if event == ("StageStarted", "update_policy")]
    ahead = [seen.events[place - 1] == ("StageStarted", "rollout") for place in updates]
    assert ahead == [True, True, False] * 2, "an update started once the process had the weights"


@pytest.mark.usefixtures("two_cores")
def test_outputs_recorded_beside_an_update_that_fails_are_reused(
    run: Run, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()

    def failing(*args: Any, **kwargs: Any) -> Any:
        assert seen.sampled.wait(120)
        raise FloatingPointError("once the outputs of the next step are there")

    failed = Run(fresh)
    with monkeypatch.context() as patch, recording(seen.take):
        patch.setattr(loop, "update_policy", failing)
        with pytest.raises(FloatingPointError):
            train(fresh, "grpo", run=failed, **CONCURRENT)
    resumed = train(fresh, "grpo", **CONCURRENT)
    assert resumed.content == run.content
    assert failed.executed["rollout"] + resumed.executed["rollout"] == 6


@pytest.mark.usefixtures("two_cores")
def test_an_update_that_fails_stops_the_sampling_beside_it(
    run: Run, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order to sample is not given before the update has failed, so that it is surely not done."""
    seen, failed, pids, call = Seen(), threading.Event(), list[int](), apart.Sampler.call

    def late(sampler: apart.Sampler, function: Any, arguments: Any) -> Any:
        if function.__name__ == "sample_outputs":
            pids.extend(sampler.group.pids)
            assert failed.wait(120)
        return call(sampler, function, arguments)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise FloatingPointError("at once")

    def stop(reason: str) -> None:
        stopped(reason)
        failed.set()

    stopped = apart.stop_sampler
    with monkeypatch.context() as patch, recording(seen.take):
        patch.setattr(loop, "update_policy", failing)
        patch.setattr(apart.Sampler, "call", late)
        patch.setattr(apart, "stop_sampler", stop)
        with pytest.raises(FloatingPointError, match="at once"):
            train(fresh, "grpo", **CONCURRENT)
    assert seen.events[-2:] == [("StageStarted", "rollout"), ("StageFailed", "rollout")]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "sampling" not in [thread.name for thread in threading.enumerate()]
    assert train(fresh, "grpo", **CONCURRENT).content == run.content


@pytest.mark.usefixtures("two_cores")
def test_a_sampler_that_dies_costs_its_outputs_and_not_the_update_beside_it(
    run: Run, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, failed = apart.Sampler.call, Run(fresh)

    def killed(sampler: apart.Sampler, function: Any, arguments: Any) -> Any:
        if function.__name__ == "sample_outputs":
            os.kill(sampler.group.pids[0], signal.SIGKILL)
        return call(sampler, function, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(apart.Sampler, "call", killed)
        with pytest.raises(WorkerError) as caught:
            train(fresh, "grpo", run=failed, **CONCURRENT)
    assert caught.value.exit_code == -signal.SIGKILL
    assert (failed.executed["update_policy"], failed.executed["rollout"]) == (1, 1)
    resumed = train(fresh, "grpo", **CONCURRENT)
    assert resumed.content == run.content
    assert (resumed.executed["update_policy"], resumed.executed["rollout"]) == (5, 5)


@pytest.mark.parametrize(
    ("cores", "cuda", "settings", "complaint"),
    [
        (1, False, {}, "2 threads .* found 1"),
        (2, False, {"update.training.threads": 2}, "3 threads .* found 2"),
        (16, True, {}, "on GPUs"),
    ],
)
def test_always_is_refused_where_the_machine_has_no_room_for_both(
    cores: int, cuda: bool, settings: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "within_quota", lambda count: cores)
    monkeypatch.setattr(side_by_side, "has_cuda", lambda: cuda)
    config = BASE.override(CONCURRENT | settings)
    with pytest.raises(ConfigError, match=f"side_by_side: {complaint}"):
        side_by_side.runs_side_by_side(config)
    assert not side_by_side.runs_side_by_side(config.override({"side_by_side": "auto"}))


def test_whether_the_two_run_side_by_side_is_not_part_of_which_run_it_is() -> None:
    assert BASE.override(CONCURRENT).identity() == BASE.override(OVERLAP).identity()
    assert BASE.override(OVERLAP).identity() != BASE.override(OVERLAP | {"overlap": 0}).identity()
