"""Runs of a pool, without a server: versions of packages, names of processes."""

from __future__ import annotations

import psutil
import pytest

from flows.deploying.pool import VersionsError, check_versions, differing, versions_environment
from pipeline.orchestration.flow_runs import names_living_process, process_name
from pipeline.store.context import package_versions


def test_packages_that_only_the_worker_has_are_no_difference() -> None:
    expected, found = (
        {"torch": "2.13.0", "numpy": "2.3", "vllm": "0.32"},
        {"torch": "2.12.1", "numpy": "2.3", "peft": "1"},
    )
    assert differing(expected, found) == ["torch: expected 2.13.0, found 2.12.1", "vllm: expected 0.32, found none"]


def test_other_versions_are_named_and_refused_only_where_asked() -> None:
    found = package_versions() | {"torch": "0.1"}
    differences = [f"torch: expected {package_versions()['torch']}, found 0.1"]
    assert check_versions(versions_environment(required=False), found) == differences
    with pytest.raises(VersionsError, match=r"(?s)--require-versions.*torch: expected .*, found 0\.1"):
        check_versions(versions_environment(required=True), found)
    assert check_versions(versions_environment(required=True), package_versions()) == []
    assert check_versions({}, found) == [], "a deployment of prefect.yaml names none"


def test_a_process_is_known_by_host_pid_and_start_time() -> None:
    host, pid, start = process_name().rsplit(":", 2)
    assert names_living_process(process_name()) is True
    assert names_living_process(f"{host}:{pid}:1{start}") is False
    assert names_living_process(f"another-host:{pid}:{start}") is None
    assert names_living_process("ProcessWorker 1b2c") is None
    assert int(pid) == psutil.Process().pid
