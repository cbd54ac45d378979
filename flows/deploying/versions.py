"""Versions of packages: those of whoever deployed, held against those of the worker that trains.

Other versions may give other numbers. They are always noted with the run, and refused when the deployment asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from pipeline.store.context import package_versions

__all__ = ["REQUIRED", "VERSIONS", "VersionsError", "check_versions", "differing", "versions_environment"]

VERSIONS: Final = "COHORT_DEPLOYER_VERSIONS"
"""In the environment of a deployment's runs: package -> version of whoever deployed, as JSON."""
REQUIRED: Final = "COHORT_REQUIRE_VERSIONS"
"""`1` there refuses a worker with other versions."""


class VersionsError(RuntimeError):
    """A worker has other packages than the deployer, and the deployment asks for the same; lists them."""


def versions_environment(*, required: bool) -> dict[str, str]:
    """What a deployment tells its runs about the packages of this process."""
    return {VERSIONS: json.dumps(package_versions()), REQUIRED: "1" if required else "0"}


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """`package: expected 1.0, found 2.0`, for every package of `expected`; what else a worker has is its own affair."""
    return [
        f"{name}: expected {version}, found {found.get(name, 'none')}"
        for name, version in expected.items()
        if found.get(name) != version
    ]


def check_versions(environment: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What differs from the deployer's packages, as far as `environment` names them.

    Raises:
        VersionsError: something does, and the deployment requires the same.
    """
    differences = differing(json.loads(environment.get(VERSIONS, "{}")), found)
    if differences and environment.get(REQUIRED, "0") == "1":
        raise VersionsError(
            "this worker has other packages than the deployer, and the deployment requires the same "
            "(--require-versions); install them here, or deploy again from where they fit\n  "
            + "\n  ".join(differences)
        )
    return differences
