"""Tables of the report as text, and how values stand in their cells."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.wording import number, percent

__all__ = ["Grid", "setting", "setting_pair", "spread"]


@dataclass(frozen=True)
class Grid:
    """A table; the first column names its rows."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of it."""
    numbers: bool = True
    """Whether all columns but the first hold numbers."""


def spread(values: Sequence[float]) -> str:
    """Mean and, where they differ, the range: `0.512 (0.490-0.530)`; `-` without values."""
    if not values:
        return "-"
    mean, low, high = (percent(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def setting_pair(was: Any, now: Any) -> tuple[str, str]:
    """Two values of a setting: lists of parts by their kinds, in full where those are equal."""
    short = setting(was), setting(now)
    return short if short[0] != short[1] else (_full(was), _full(now))


def setting(value: Any) -> str:
    """A value of a configuration; a list of parts by their kinds."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return ", ".join(_kind(part) for part in value)
    return number(value)


def _kind(part: Any) -> str:
    if isinstance(part, dict) and "kind" in part:
        return str(part["kind"])
    return str(getattr(part, "kind", part))


def _full(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
