"""What all tests of a module share, so that worker processes start once and not for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.residency import evict
from pipeline.store import Store, use_store
from pipeline.workers.pool import KillablePool
from stages.reward.rules.accuracy import VERIFIER_MODULES


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with use_store(Store(tmp_path_factory.mktemp("module") / "store")):
        yield
    evict()


@pytest.fixture(scope="module")
def verifiers() -> Iterator[KillablePool]:
    """Processes in which math-verify compares."""
    pool = KillablePool(workers=2, memory_mb=1024, preload=VERIFIER_MODULES)
    yield pool
    pool.close()
