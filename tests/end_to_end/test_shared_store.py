"""Whole runs against a store behind a real S3 API: a second machine computes nothing, expired credentials lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.runs.paths import Places
from flows.runs.record import read_records
from tests.flows.test_cli import cohort, command
from tests.pipeline.s3 import Cloud, Fault, environment, serving

pytestmark = pytest.mark.scale


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with serving() as opened:
        yield opened


def test_expired_credentials_lose_nothing_and_another_machine_reuses_all(cloud: Cloud, tmp_path: Path) -> None:
    shared = environment(cloud) | {"COHORT_STORE": cloud.url()}
    cloud.faults.append(Fault("refuse", "PUT", "/actions/", 10_000, code="ExpiredToken", status=400))
    cut_off = cohort(*command(root=tmp_path / "one"), **shared)
    assert cut_off.returncode != 0
    assert "the credentials have expired (ExpiredToken)" in " ".join((cut_off.stdout + cut_off.stderr).split())
    cloud.faults.clear()

    first = cohort(*command(root=tmp_path / "one"), **shared)
    assert first.returncode == 0, first.stderr
    assert "0 stages computed" not in first.stdout
    cloud.requests.clear()

    second = cohort(*command(root=tmp_path / "two"), **shared)
    assert second.returncode == 0, second.stderr
    assert "0 stages computed" in second.stdout
    assert second.stdout.splitlines()[-1] == "IMPORTED"
    assert cloud.asked("PUT", "/objects/") == 0
    policies = {next(read_records(Places(tmp_path / root))).policy for root in ("one", "two")}
    assert len(policies) == 1
    assert not (tmp_path / "two" / "store" / "objects").joinpath(*_place(policies.pop())).exists()  # it was not read


def _place(digest: str) -> tuple[str, str]:
    return digest[:2], digest
