from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.choice import choose
from flows.cli import run_command
from flows.doctor.bench import _SMALL, _TINY, calibrated
from flows.ledger import Ledger
from flows.places import Places
from flows.planning.advice import changes_of, remedy_for
from flows.planning.cached import calls_of, progress_of
from flows.planning.given import Lengths
from flows.planning.lengths import lengths_for
from flows.planning.machine import DEVICE_FILE, machine_of
from flows.planning.plan import Plan, evaluations_of, plan_of
from flows.planning.profiles import PRESETS, profile_named, read_profile, seconds_of
from flows.planning.request import Request, subject_of
from flows.planning.work import Work
from pipeline.config import ConfigError
from pipeline.store import use_store
from stages.data import arithmetic_questions
from stages.tables import Rollouts
from tests.stages.update.test_examples import rollout_row

CPU = PRESETS["cpu"]
Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The plan of a recipe on an empty root."""

    def plan(recipe: str, *settings: str, **request: Any) -> Plan:
        config = choose(recipe, settings=settings).config
        return plan_of(subject_of(config, Places(tmp_path), Request(**request)).given)

    return plan


def one(plan: Plan, name: str) -> Any:
    return next(stage for stage in plan.stages if stage.name == name)


# ------------------------------------------------------------------------------------------------ rates


def test_a_rate_between_two_widths_lies_along_their_logarithm() -> None:
    profile = CPU.override({"fp32": {"64": 1e9, "256": 3e9}})
    assert [profile.rate(width, "fp32") for width in (32, 64, 128, 256, 999)] == pytest.approx(
        [1e9, 1e9, 2e9, 3e9, 3e9]
    )


def test_seconds_are_work_over_rates_over_utilisation_and_fixed_costs() -> None:
    profile = CPU.override({"fp32": {"1": 100.0}, "bandwidth": 10.0, "training": 0.5, "layer_seconds": 0.25})
    assert seconds_of(Work(flops=200, traffic=30, layers=4), profile, 64, "fp32") == (2 + 3) / 0.5 + 4 * 0.25
    work = Work(flops=200, traffic=30, reads=40)
    assert seconds_of(work, profile, 64, "fp32") == (2 + 3 + 4) / 0.5
    assert seconds_of(work, profile.override({"reading": 40.0}), 64, "fp32") == (2 + 3 + 1) / 0.5


def test_threads_beyond_those_that_were_measured_bring_nothing() -> None:
    profile = CPU.override({"threads": 3, "parallel": 2.0})
    assert [profile.speed(threads) for threads in (1, 2, 3, 8, None)] == [1.0, 1.5, 2.0, 2.0, 2.0]


def test_an_unknown_profile_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100-80g'"):
        profile_named("h100")


def test_calibration_makes_the_formulas_give_what_the_trials_took() -> None:
    profile = calibrated(CPU, _SMALL, "fp32", [0.01, 2.0], [0.02, 3.0])
    from flows.doctor.bench import _decoding_work, _training_work

    assert seconds_of(_training_work(_SMALL, "fp32"), profile, 256, "fp32") == pytest.approx(2.0)
    assert seconds_of(_decoding_work(_SMALL, "fp32"), profile, 256, "fp32", sampling=True) == pytest.approx(3.0)
    assert profile.layer_seconds == pytest.approx(0.01 / (3 * 4))  # forward and backward of four layers, in one batch
    assert profile.token_seconds == pytest.approx(0.02 / (_TINY.shape.layers * (_TINY.output + 1)))


def test_a_measured_profile_is_taken_where_nothing_else_is_asked_for(tmp_path: Path) -> None:
    measured = CPU.override({"name": "this one", "date": "2026-11-21 12:00"})
    (tmp_path / DEVICE_FILE).write_text(measured.model_dump_json())
    options: dict[str, Any] = {"gpus": None, "gpu_memory": None, "nodes": None}
    assert machine_of(Places(tmp_path), device=None, **options).profile == measured
    assert machine_of(Places(tmp_path), device="a100-80g", **options).profile == PRESETS["a100-80g"]
    assert read_profile(tmp_path / DEVICE_FILE) == measured


@pytest.mark.parametrize("options", [{"gpus": 0}, {"gpu_memory": -1.0}, {"nodes": 0}])
def test_no_devices_are_no_machine(planned: Planned, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a positive number"):
        planned("arithmetic_smoke", **options)


# ------------------------------------------------------------------------------------------------ plans


def test_a_plan_counts_the_calls_that_runs_were_seen_to_make() -> None:
    """docs/lab.md: 266 stages of the demo, 43 of the smallest run, and since then a count of votes in every evaluation."""
    found = {
        name: sum(count for _, count in calls_of(choose(name).config))
        for name in ("arithmetic_cpu", "arithmetic_smoke")
    }
    assert found == {"arithmetic_cpu": 286, "arithmetic_smoke": 49}


def test_the_first_and_the_last_policy_are_evaluated_whatever_is_due() -> None:
    config = choose("arithmetic_cpu").config
    assert [evaluations_of(config.override({"evaluation.every": every})) for every in (0, 10, 15)] == [2, 5, 4]


def test_what_others_keep_stands_beside_a_stage(planned: Planned) -> None:
    """While outputs are sampled the trainer has its weights and moments, the reference its weights; not the other way round."""
    plan = planned("arithmetic_cpu")
    policy = plan.given.shape.parameters
    assert one(plan, "rollout").held == (4 + 12 + 4) * policy  # ZeRO 1 has masters of its own
    assert one(plan, "update").held == one(plan, "rollout").memory["weights"]
    assert one(plan, "sft").held == 0


def test_the_papers_recipe_plans_without_its_model(planned: Planned) -> None:
    plan = planned("deepseekmath_7b", gpus=8, gpu_memory=80.0)
    assert plan.given.shape.parameters == 6_910_365_696
    assert plan.ranks == 8
    assert one(plan, "update").work.flops > 6 * 6.9e9 * 1024 * (128 + 512)


def test_a_model_that_nobody_knows_needs_its_config(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model-config"):
        planned("deepseekmath_7b", "policy.path=someone/other-7b", device="a100-80g")
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    (tmp_path / "model.json").write_text(json.dumps(settings))
    plan = planned("deepseekmath_7b", device="a100-80g", model_config=tmp_path / "model.json")
    assert plan.given.shape.hidden == 64


def test_a_mean_beyond_the_longest_output_is_refused(planned: Planned) -> None:
    with pytest.raises(ConfigError, match=r"at most rollout\.max_output_tokens=64"):
        planned("arithmetic_cpu", mean_output_tokens=65.0)


def test_changes_are_ranked_and_save_what_they_say(planned: Planned) -> None:
    plan = planned("gsm8k_cpu", "update.micro_batch_tokens=65536", device="a100-80g", gpu_memory=3.0)
    assert plan.missing > 0
    assert plan.worst.name == "update"
    changes = changes_of(plan)
    assert [change.fits for change in changes] == sorted((change.fits for change in changes), reverse=True)
    for change in changes:
        assert plan.peak - change.plan.peak == change.saves > 0
    best = planned(
        "gsm8k_cpu",
        "update.micro_batch_tokens=65536",
        *(f"{key}={json.dumps(value)}" for key, value in changes[0].settings.items()),
        device="a100-80g",
        gpu_memory=3.0,
    )
    assert best.peak == changes[0].plan.peak


def test_changes_are_added_until_the_run_fits(planned: Planned) -> None:
    plan = planned("gsm8k_cpu", "update.micro_batch_tokens=65536", device="a100-80g", gpu_memory=1.8)
    taken, final = remedy_for(plan)
    assert final.missing <= 0
    assert plan.missing > final.missing
    assert [change.saves > 0 for change in taken] == [True] * len(taken)


def test_lengths_are_those_of_the_last_step_that_was_run(tmp_path: Path) -> None:
    config, places = choose("arithmetic_smoke").config, Places(tmp_path)
    with use_store(places.open_store()):
        outputs = Rollouts.write([rollout_row("q", 0, [5, 6]), rollout_row("q", 1, [5, 6, 7, 8, 9])])
        prompt = len(outputs.rows()[0]["prompt_ids"])
    ledger = Ledger(steps={1: {"rollout": "0" * 64}, 2: {"rollout": outputs.digest}})
    found, said = lengths_for(config, places, places.open_store(), ledger, prompt=None, output=None)
    assert found == Lengths(prompt, 3.5, config.rollout.max_output_tokens)
    assert said[0].endswith("as those of the last step that was run")
    given, _ = lengths_for(config, places, places.open_store(), ledger, prompt=9, output=None)
    assert given == Lengths(9, 3.5, config.rollout.max_output_tokens)


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


def test_what_is_recorded_is_found_and_nothing_is_computed(tmp_path: Path) -> None:
    config, places = choose("arithmetic_smoke").config, Places(tmp_path)
    empty = progress_of(config, places.open_store())
    assert (empty.found, empty.total, empty.steps, empty.ended) == (0, 49, 0, False)
    with use_store(places.open_store()):
        arithmetic_questions(config.data.train, "train")
    written = sorted(path for path in tmp_path.rglob("*"))
    begun = progress_of(config, places.open_store())
    assert (begun.found, begun.total, begun.note) == (1, 49, "")
    assert sorted(path for path in tmp_path.rglob("*")) == written


def test_the_command_prints_one_json_object_whose_parts_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", "arithmetic_smoke", "--json", "--root", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = found["stages"]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] * stage["calls"] for stage in stages))
    assert found["peak"] == pytest.approx(found["overhead"] + max(stage["peak"] for stage in stages))
    assert found["calls"]["total"] == 49
    assert any("--mean-output-tokens" in text for text in found["assumptions"])


def test_the_command_says_that_a_run_does_not_fit_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "deepseekmath_7b", "--gpus", "8", "--gpu-memory", "24", "--root", str(tmp_path)]
    assert run_command(command) == 1
    printed = capsys.readouterr().out
    assert "does not fit by" in printed
    assert "0 of" in printed
    assert "assumed" in printed
