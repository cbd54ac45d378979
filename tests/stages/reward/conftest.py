"""One store for all tests of a module, so that worker processes start once and not for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.residency import evict
from pipeline.store import Store, use_store


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with use_store(Store(tmp_path_factory.mktemp("module") / "store")):
        yield
    evict()
