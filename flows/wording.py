"""How numbers and moments are written for people, in the live display, the summary and the tables of the commands."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["accuracies", "at_k", "duration", "moment", "number", "percent", "size"]

_AT_K: Final = re.compile(r"(?:pass|maj)_at_(\d+)")


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
    parts += [f"{label.lower()} {percent(metrics.get(key))}" for label, key in at_k(metrics).items()]
    return " ".join(parts)


def at_k(metrics: Iterable[str]) -> dict[str, str]:
    """Label -> metric: `Pass@8`, `Maj@8` by K from 2 on, both at each K that one of them has: Maj@K may be undefined."""
    ks = sorted({int(found[1]) for key in metrics if (found := _AT_K.fullmatch(key))})
    named = (("Pass", "pass_at_"), ("Maj", "maj_at_"))
    return {f"{label}@{k}": f"{prefix}{k}" for label, prefix in named for k in ks if k > 1}
