"""What is known of the stage call that is running: who made an artifact, from what, and the metrics it recorded."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

__all__ = ["Call", "calling", "current_provenance", "record_metrics", "record_package"]

_METRIC_NAME = re.compile(r"[A-Za-z0-9_\-. :/]+")  # what MLflow accepts


@dataclasses.dataclass
class Call:
    """One call of a stage: its identity and what it recorded so far."""

    stage: str
    version: str
    arguments: dict[str, Any]
    started: float = dataclasses.field(default_factory=time.time)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    packages: dict[str, str] = dataclasses.field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """Plain JSON for manifests and action records."""
        return {
            "stage": self.stage,
            "version": self.version,
            "arguments": self.arguments,
            "metrics": dict(self.metrics),
            "created": self.started,
            "packages": package_versions() | self.packages,
        }


calling: ContextVar[Call | None] = ContextVar("cohort_call", default=None)


def current_provenance() -> dict[str, Any] | None:
    """Provenance of the stage call in progress; None outside of one."""
    call = calling.get()
    return call.provenance() if call else None


def record_metrics(metrics: Mapping[str, float | int | bool | None]) -> None:
    """Keep numbers with the artifact that the running stage makes; a cached call draws the same curves from them.

    None means "not measured" and is left out, as is a value that is not finite (it is counted in `nonfinite_metrics`, since
    MLflow stores infinity as a number). Outside a stage this does nothing.

    Raises:
        ValueError: a name with characters other than letters, digits, `_-. :/`.
    """
    call = calling.get()
    for name, value in metrics.items():
        if not _METRIC_NAME.fullmatch(name):
            raise ValueError(f"metric name {name!r}: expected letters, digits and _-. :/ only")
        if call is None or value is None:
            continue
        if math.isfinite(value):
            call.metrics[name] = float(value)
        else:
            call.metrics["nonfinite_metrics"] = call.metrics.get("nonfinite_metrics", 0.0) + 1.0


def record_package(name: str, version: str) -> None:
    """Keep the version of a package that made the running stage's result in another process. Outside a stage: nothing."""
    call = calling.get()
    if call is not None:
        call.packages[name] = version


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    names = ("torch", "transformers", "deepspeed", "vllm", "pyarrow", "numpy", "math-verify", "cohort-rl")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
