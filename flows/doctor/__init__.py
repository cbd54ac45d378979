"""`cohort doctor`: whether this machine can run Cohort, and what to fix. A check is a function that yields findings."""

from __future__ import annotations

from typing import Final

from flows.doctor import devices, imports, places, servers, versions
from flows.doctor.examination import Check

__all__ = ["CHECKS"]

CHECKS: Final = (
    Check("versions", versions.python),
    Check("versions", versions.packages),
    Check("versions", versions.companions),
    Check("versions", versions.ground_types),
    Check("versions", imports.imports, deadline=400.0, quick=False),
    Check("versions", imports.vllm, deadline=100.0),
    Check("versions", imports.vllm_imports, deadline=100.0, quick=False),
    Check("devices", devices.processors),
    Check("devices", devices.memory),
    Check("devices", devices.driver, quick=True),
    Check("devices", devices.torch, deadline=100.0, quick=False),
    Check("store", places.file_system),
    Check("store", places.space),
    Check("store", places.commits),
    Check("store", places.locking),
    Check("store", places.records),
    Check("store", places.temporary),
    Check("servers", servers.prefect),
    Check("servers", servers.prefect_database),
    Check("servers", servers.mlflow),
    Check("servers", servers.loopback),
    Check("servers", servers.proxies),
    Check("servers", imports.vllm_servers),
    Check("environment", devices.launcher),
    Check("environment", devices.threads),
    Check("environment", devices.switches),
)
"""Adding a check is a function and a line here."""
