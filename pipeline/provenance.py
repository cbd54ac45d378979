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
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.store.files import is_digest

__all__ = [
    "LONGEST",
    "Call",
    "CallRecord",
    "Digest",
    "Label",
    "Moment",
    "RecordedCall",
    "Seconds",
    "calling",
    "complaint",
    "current_provenance",
    "record_metrics",
    "record_package",
]

_METRIC_NAME = re.compile(r"[A-Za-z0-9_\-. :/]+")  # what MLflow accepts


LONGEST: Final = 1e10
"""Seconds. Three centuries: no run takes longer, and a calendar has a date for it."""


def _digest(value: str) -> str:
    if not is_digest(value):
        raise ValueError("expected 64 hexadecimal digits")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("expected text without control characters")
    return value


def _arguments(value: Any) -> Any:
    """Recorded arguments: whatever names an artifact names it by a digest, and by nothing that could be a path."""
    match value:
        case {"artifact": name} if len(value) == 1:
            _digest(name)
        case dict():
            for part in value.values():
                _arguments(part)
        case list():
            for part in value:
                _arguments(part)
    return value


# What stands in files that others may have written is checked where it is read, so that what comes after need not.
Digest = Annotated[str, AfterValidator(_digest)]
Label = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Moment = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]
"""Seconds since the epoch."""
Seconds = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]
_Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]
_Metrics = dict[Label, Annotated[float, Field(allow_inf_nan=False)]]


class RecordedCall(BaseModel):
    """What the manifest of an artifact says of the call that made it: what it has must be of these types."""

    model_config = ConfigDict(strict=True)

    stage: Label = ""
    version: Label = ""
    arguments: _Arguments = {}
    metrics: _Metrics = {}
    created: Moment = 0.0
    packages: dict[Label, Label] = {}


class CallRecord(RecordedCall):
    """The record of a stage call; no field may be missing but metrics and packages."""

    key: Digest
    result: Digest
    stage: Label
    version: Label
    type: Label
    arguments: _Arguments
    seconds: Seconds
    created: Moment
    imported: Label = ""
    """The archive that brought the record; empty: the call was carried out by who shares this store."""


def complaint(error: ValidationError) -> str:
    """The first thing that does not fit, in one line: `result: expected 64 hexadecimal digits`."""
    first = error.errors(include_url=False)[0]
    place = "".join(letter if letter.isprintable() else "?" for letter in ".".join(map(str, first["loc"])))
    return f"{place[:100] or 'record'}: {first['msg'].removeprefix('Value error, ')}"


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
