"""One server for the tests of deployments: a new database costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flows.deploying.project import Project, opened


@pytest.fixture(scope="package")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with its server, until the last test of this folder."""
    with opened(tmp_path_factory.mktemp("artifacts")) as made:
        yield made
