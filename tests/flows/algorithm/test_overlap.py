"""Outputs of the policy before the last update: which policy samples for which step, and what the update makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from flows import iterative_rl as loop
from flows.runs.ledger import Ledger
from pipeline.events import recording
from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.short_runs import Run, copied, train

pytestmark = pytest.mark.slow

OVERLAP: dict[str, Any] = {"overlap": 1, "update.old_logprobs": "rollout", "iterations": 2, "steps": 3}
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
