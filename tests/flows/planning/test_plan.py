from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from flows.config.resolve import choose
from flows.planning.plan import changes_of, evaluations_of, plan_of, remedy_for
from tests.flows.planning.conftest import SEVEN_B, Planned, one


def test_the_first_and_the_last_policy_are_evaluated_whatever_is_due() -> None:
    config = choose("arithmetic_cpu").config
    assert [evaluations_of(config.override({"evaluation.every": every})) for every in (0, 10, 15)] == [2, 5, 4]


def test_what_others_keep_stands_beside_a_stage(planned: Planned) -> None:
    """While outputs are sampled the trainer has its weights and moments, the reference its weights; not the other way round."""
    plan = planned("arithmetic_cpu", "update.training.precision=fp32")
    policy = plan.given.shape.parameters
    assert one(plan, "rollout").held == (4 + 12 + 4) * policy  # ZeRO 1 has masters of its own
    assert one(plan, "update").held == one(plan, "rollout").memory["weights"]
    assert one(plan, "sft").held == 0


@pytest.mark.parametrize(
    ("settings", "cores", "share"),
    [((), 2, 39 / 40), ((), 1, 0), (("side_by_side=never",), 2, 0), (("rollout.backend.threads=2",), 2, 0)],
)
def test_what_is_sampled_beside_an_update_takes_no_time_of_its_own(
    planned: Planned, settings: tuple[str, ...], cores: int, share: float
) -> None:
    """Of 40 steps the first one samples nothing ahead: its own outputs are waited for."""
    plan = planned("arithmetic_cpu", "overlap=1", "update.old_logprobs=rollout", *settings)
    machine = replace(plan.given.machine, profile=plan.given.machine.profile.model_copy(update={"threads": cores}))
    plan = plan_of(replace(plan.given, machine=machine))
    shorter = min(one(plan, name).seconds for name in ("rollout", "update"))
    assert plan.overlapped == pytest.approx(share * shorter)
    assert sum(map(plan.total, plan.stages)) - plan.seconds == pytest.approx(40 * share * shorter)
    assert plan.overhead == (2 if share else 1) * 2**30


@pytest.mark.parametrize("gpu", [False, True])
def test_a_reference_pass_loads_its_model_once_an_iteration(planned: Planned, gpu: bool) -> None:
    """On a CPU it stays in memory; a GPU gets it anew for every pass, over 25 GB a second."""
    where: dict[str, Any] = {"gpus": 8, "gpu_memory": 80.0} if gpu else {}
    recipe = "deepseekmath_7b" if gpu else "gsm8k_cpu"
    few, many = (planned(recipe, f"steps={steps}", "reference_pass=stage", **where) for steps in (2, 8))
    profile, weights = few.given.machine.profile, one(few, "reference").memory["weights"]
    loading = 4 * few.given.shape.parameters / (profile.disk if gpu else profile.bandwidth)
    assert one(few, "reference").seconds - one(many, "reference").seconds == pytest.approx(loading * (1 / 2 - 1 / 8))
    moving = weights / 2.5e10 if gpu else 0.0
    assert one(many, "reference").seconds > loading / 8 + moving
    assert one(few, "reference").keeps == ({} if gpu else {"reference": weights})


def test_the_papers_recipe_plans_without_its_model(planned: Planned) -> None:
    plan = planned("deepseekmath_7b", gpus=8, gpu_memory=80.0)
    assert plan.given.shape.parameters == 6_910_365_696
    assert plan.ranks == 8
    assert one(plan, "update").work.flops > 6 * 6.9e9 * 1024 * (128 + 512)


WIDE = ("update.micro_batch_tokens=65536", "update.training.attention=eager")


def test_changes_are_ranked_and_save_what_they_say(planned: Planned) -> None:
    plan = planned("gsm8k_cpu", *WIDE, device="a100-80g", gpu_memory=2.2)
    assert plan.missing > 0
    assert plan.worst.name == "update"
    changes = changes_of(plan)
    assert [change.fits for change in changes] == sorted((change.fits for change in changes), reverse=True)
    for change in changes:
        assert plan.peak - change.plan.peak == change.saves > 0
    best = planned(
        "gsm8k_cpu",
        *WIDE,
        *(f"{key}={json.dumps(value)}" for key, value in changes[0].settings.items()),
        device="a100-80g",
        gpu_memory=2.2,
    )
    assert best.peak == changes[0].plan.peak


def test_changes_are_added_until_the_run_fits(planned: Planned) -> None:
    plan = planned("gsm8k_cpu", *WIDE, device="a100-80g", gpu_memory=1.8)
    taken, final = remedy_for(plan)
    assert final.missing <= 0
    assert plan.missing > final.missing
    assert [change.saves > 0 for change in taken] == [True] * len(taken)


def test_what_is_kept_is_counted_by_weights_state_and_tables(planned: Planned) -> None:
    """Two iterations of two steps; evaluated are the policies before, after step 2 and after step 4."""
    sizes = [
        planned("arithmetic_smoke", *settings).kept for settings in ((), ("keep.optimizer=1",), ("keep.rollouts=1",))
    ]
    update = one(planned("arithmetic_smoke"), "update")
    tables = sum(stage.disk for stage in planned("arithmetic_smoke").stages if stage.when == "step") - update.disk
    assert update.state == 8 * planned("arithmetic_smoke").given.shape.parameters
    assert sizes[0] - sizes[1] == pytest.approx(3 * update.state)
    assert sizes[0] - sizes[2] == pytest.approx(3 * tables)


def test_checkpoints_are_spread_over_the_steps_that_write_one(planned: Planned) -> None:
    """45 steps, evaluated every 15: every seventh, and 15, 30 and 45, of which none is a multiple of seven."""
    every = planned("arithmetic_cpu", "checkpoint.every=1", "evaluation.every=15", "iterations=1", "steps=45")
    some = planned("arithmetic_cpu", "checkpoint.every=7", "evaluation.every=15", "iterations=1", "steps=45")
    share = (6 + 3) / 45
    before, after = one(every, "update"), one(some, "update")
    assert after.disk == pytest.approx(before.disk * share)
    assert before.seconds - after.seconds == pytest.approx(before.writing), "they are written while other stages run"
    waiting = planned(
        *("arithmetic_cpu", "checkpoint.every=7", "evaluation.every=15", "iterations=1", "steps=45"),
        "checkpoint.background=false",
    )
    assert one(waiting, "update").seconds - after.seconds == pytest.approx(before.writing * share)


@pytest.mark.parametrize(
    ("room", "keep", "written"), [(100, 5, 10), (3, 5, 4), (5, 5, 6), (6, 5, 10), (0, 5, 1), (3, None, 4)]
)
def test_auto_writes_what_a_tenth_of_the_free_disk_holds(
    planned: Planned, room: int, keep: int | None, written: int
) -> None:
    """Ten steps of 83 GB each, all due; those beyond `keep` are freed and make room again. The last is always written."""
    few = ("gsm8k_cpu", "checkpoint.every=1", "evaluation.every=0", "iterations=1", "steps=10")
    plan = planned(*few, f"keep.checkpoints={json.dumps(keep)}", f"keep.optimizer={json.dumps(keep)}")
    size = 12 * SEVEN_B.parameters
    fast = replace(plan.given.machine, profile=plan.given.machine.profile.override({"disk": 1e15, "hashing": 1e15}))
    given = replace(plan.given, shape=SEVEN_B, machine=fast, free=10 * size * (room + 0.5))
    assert round(10 * one(plan_of(given), "update").written) == 10, "of a number that is set nothing is left out"
    auto = replace(given, config=given.config.override({"checkpoint.every": "auto"}))
    assert round(10 * one(plan_of(auto), "update").written) == written
    unknown = replace(auto, free=None)
    assert round(10 * one(plan_of(unknown), "update").written) == 10


def test_the_papers_run_writes_a_twentieth_of_the_time(planned: Planned) -> None:
    plan = planned("deepseekmath_7b", gpus=8, gpu_memory=80.0)
    update, steps = one(plan, "update"), plan.counts["step"]
    seconds, size = plan.of_a_step()
    assert update.disk / update.written == pytest.approx(12 * 6_910_365_696, rel=0.01)
    assert update.writing * update.written == pytest.approx(seconds / 20, rel=0.05)
    assert update.written * steps > 100
    assert size < 5e9
