"""Devices, limits of containers, and variables of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.doctor import devices
from flows.doctor.examination import Subject
from flows.runs.paths import Places
from stages.training.hardware import cpu_quota
from tests.flows.doctor.subjects import only, with_only


def device(**about: Any) -> dict[str, Any]:
    return {"number": 0, "name": "H200", "free": 140e9, "total": 150e9, "bf16": True} | about


@pytest.mark.parametrize(
    ("found", "ranks", "severities"),
    [
        ([device()], 1, ["ok"]),
        ([device(free=20e9)], 1, ["warning"]),
        ([device(error="CUDA error: no kernel image")], 1, ["problem"]),
        ([device(bf16=False)], 1, ["warning"]),
        ([device(), device(number=1)], 3, ["ok", "ok", "problem"]),
    ],
)
def test_a_device_that_is_full_broken_or_missing_for_a_rank_is_named(
    found: list[dict[str, Any]], ranks: int, severities: list[str]
) -> None:
    seen = {"devices": found, "nccl": True, "cuda_build": "12.8"}
    findings = list(devices.gpus(seen, Subject(Places(Path("/nowhere")), {}, ranks=ranks)))
    assert [finding.severity for finding in findings] == severities


def test_the_limits_of_both_versions_of_control_groups_are_read(tmp_path: Path) -> None:
    assert (cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (None, None)
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("5\n")
    assert (cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (0.5, None)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert (cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (None, 600)


@pytest.mark.parametrize(
    ("value", "severity"),
    [
        ("1", "ok"),
        (" 1 , 1", "ok"),
        ("abc", "warning"),
        ("0", "warning"),
        ("", "warning"),
        ("-1", "warning"),
        ("99999", "warning"),
    ],
)
def test_numbers_of_threads_that_openmp_ignores_or_beyond_the_cores_warn(value: str, severity: str) -> None:
    found = only(devices.threads(with_only(OMP_NUM_THREADS=value)))
    assert found.severity == severity


@pytest.mark.parametrize(
    ("environment", "severity", "text"),
    [
        ({}, "ok", "no variables"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "ok", "RANK=0, WORLD_SIZE=1: inherited"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "warning", "one of 4"),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8"}, "warning", "SLURM_NTASKS=8"),
        ({"SLURM_JOB_ID": "17", "SLURM_JWT": "eyJ.secret"}, "ok", "SLURM_JOB_ID=17: inherited"),
        ({"SLURM_JWT": "eyJ.secret"}, "ok", "SLURM_JWT: inherited"),
    ],
)
def test_a_launcher_that_started_several_of_us_is_warned_of(
    environment: dict[str, str], severity: str, text: str
) -> None:
    found = only(devices.launcher(with_only(**environment)))
    assert found.severity == severity
    assert text in found.found
    assert "secret" not in found.found + str(found.values)


def test_switches_are_shown_and_other_variables_are_not() -> None:
    found = only(devices.switches(with_only(HF_HUB_OFFLINE="1", HF_TOKEN="hf_x", TOKENIZERS_PARALLELISM="false")))
    assert found.values == {"HF_HUB_OFFLINE": "1"}
    assert "nothing is fetched" in found.found
