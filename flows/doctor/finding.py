"""What a check found, and what is said about it: ok, a warning, or a problem that stops a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "redacted"]

Severity = Literal["ok", "warning", "problem"]
SEVERITIES: Final[tuple[Severity, ...]] = ("ok", "warning", "problem")
"""From harmless to what stops a run."""

_LOGIN: Final = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s@'\"]*(?:@[^/\s@'\"]*)*@")
_PARAMETER: Final = re.compile(r"(?i)([\w-]*(?:token|secret|password|passwd|pwd|key|credentials?)=)[^&\s'\"]+")


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    check: str
    """Stable name, which scripts may rely on: `python`, `package.torch`, `locking`."""
    severity: Severity
    found: str
    """What there is, in one sentence."""
    advice: str = ""
    """What to do; empty where nothing needs to be done."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs: plain JSON values."""


def redacted(value: Any) -> Any:
    """The value without what opens doors: logins in URLs, and parameters with the name of a secret."""
    if isinstance(value, str):
        return _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1***@", value))
    if isinstance(value, Mapping):
        return {name: redacted(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(part) for part in value]
    return value
