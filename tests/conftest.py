"""Fixtures of the whole suite: a store of its own for each test, and real data where it is at hand."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for child processes too: threads of tests that run side by side wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's background job starts with SIGINT ignored, one under nohup with SIGHUP, and every child would inherit that:
# interrupts would not be tested.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

import pytest
from hypothesis import HealthCheck, settings

from flows.tracking.sender import start_sender
from pipeline.residency import evict
from pipeline.store import Store, use_store

# An example that takes long says how busy the machine is, not that the code is wrong.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

DATA = Path(os.environ.get("COHORT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _wait_for_no_disk() -> Iterator[None]:
    """Leave out fsync: no test survives a loss of power, and it takes a third of what writing a store costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _runs_start_no_sender() -> Iterator[None]:
    """Leave MLflow to a later sync: a sender would write to its database while tests read or copy the root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.tracking.delivery.start_sender", lambda home: None)
        patch.setattr("flows.tracking.delivery.CLOSE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def sender() -> Iterator[None]:
    """Let runs start the process that sends to MLflow, and wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.tracking.delivery.start_sender", start_sender)
        patch.setattr("flows.tracking.delivery.CLOSE_SECONDS", 120.0)
        yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store, current for the test; what became resident in it is evicted."""
    with use_store(Store(tmp_path / "store")) as opened:
        yield opened
    evict()
    gc.freeze()  # what lives now, modules above all, is not looked through again whenever something is evicted


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets; `COHORT_DATA` names another."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found: {DATA} (set COHORT_DATA)")
    return DATA
