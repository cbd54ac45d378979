"""A supervised policy for all tests of flows: made once in each process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.short_runs import Run, train


@pytest.fixture(scope="session")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that ends with supervised fine-tuning. Its store is shared: a test that writes takes a copy (`copied`)."""
    run = train(Store(tmp_path_factory.mktemp("supervised")), "grpo", iterations=0)
    made = run.store.actions()
    yield run
    evict()
    assert run.store.actions() == made, "a test wrote into the shared store, and others depend on its order"
