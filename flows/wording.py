"""How numbers and moments are written for people, in the live display, the summary and the tables of the commands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

__all__ = ["accuracies", "duration", "moment", "number", "percent", "size"]


def duration(seconds: float) -> str:
    """`0.3 s`, `12 s`, `4:05 min`, `1:02:03 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def number(value: Any) -> str:
    """Integers with thousands separators, floats with four significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """`0.512`: three digits, since a thousand questions resolve no more; `-` where it was not measured."""
    return "-" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes: `512 B`, `4.1 kB`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def moment(seconds: float) -> str:
    """Local date and time of `seconds` since the epoch, the year where it is not this one."""
    then = time.localtime(seconds)
    return time.strftime("%d %b %H:%M" if then.tm_year == time.localtime().tm_year else "%d %b %Y %H:%M", then)


def accuracies(metrics: Mapping[str, float]) -> str:
    """An evaluation in one line: accuracy with its interval, then pass@k and maj@k by k."""
    if "greedy_accuracy" in metrics:
        return f"greedy {percent(metrics['greedy_accuracy'])}"
    parts = [f"sampled {percent(metrics.get('accuracy'))}"]
    if "accuracy_ci_low" in metrics and "accuracy_ci_high" in metrics:
        parts.append(f"[{percent(metrics['accuracy_ci_low'])}, {percent(metrics['accuracy_ci_high'])}]")
    for name in ("pass_at_", "maj_at_"):
        found = sorted((int(key.removeprefix(name)), value) for key, value in metrics.items() if key.startswith(name))
        parts += [f"{name[:4].rstrip('_')}@{k} {percent(value)}" for k, value in found if k > 1]
    return " ".join(parts)
