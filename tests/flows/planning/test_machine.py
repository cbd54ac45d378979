from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.config.resolve import choose
from flows.planning.machine import DEVICE_FILE, PRESETS, machine_of, profile_named, read_profile, settled
from flows.runs.paths import Places
from pipeline.config import ConfigError
from tests.flows.planning.conftest import Planned

CPU = PRESETS["cpu"]


def test_a_rate_between_two_widths_lies_along_their_logarithm() -> None:
    profile = CPU.override({"fp32": {"64": 1e9, "256": 3e9}})
    assert [profile.rate(width, "fp32") for width in (32, 64, 128, 256, 999)] == pytest.approx(
        [1e9, 1e9, 2e9, 3e9, 3e9]
    )


def test_threads_beyond_those_that_were_measured_bring_nothing() -> None:
    profile = CPU.override({"threads": 3, "parallel": 2.0})
    assert [profile.speed(threads) for threads in (1, 2, 3, 8, "auto")] == [1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(("native", "name"), [(True, "cpu-bf16"), (False, "cpu")])
def test_a_cpu_that_was_not_measured_is_the_preset_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: bool, name: str
) -> None:
    monkeypatch.setattr("flows.planning.machine.native_bf16", lambda: native)
    machine = machine_of(Places(tmp_path), device=None, gpus=None, gpu_memory=None, nodes=None)
    assert (machine.profile.name, machine.half) == (name, native)


def test_an_unknown_profile_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100-80g'"):
        profile_named("h100")


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


@pytest.mark.parametrize(
    ("device", "found"),
    [("a100-80g", ("bf16", "sdpa")), ("cpu", ("fp32", "eager")), ("cpu-bf16", ("bf16", "eager"))],
)
def test_a_plan_is_of_what_auto_is_on_the_machine_planned_for(
    tmp_path: Path, device: str, found: tuple[str, str]
) -> None:
    machine = machine_of(Places(tmp_path), device=device, gpus=None, gpu_memory=None, nodes=None)
    config = choose("arithmetic_learned_reward", settings=["critic=null", "sft.training.precision=fp32"]).config
    there, said = settled(config, machine)
    assert config.reward_model is not None
    assert there.reward_model is not None
    parts = (there.update.training, there.reward_model.scoring, there.reward_model.training.training)
    assert {(part.precision, part.attention) for part in parts} == {found}
    assert there.sft is not None
    assert (there.sft.training.precision, len(said)) == ("fp32", 1)
    assert settled(there, machine) == (there, [])
