"""Name the metrics of rewards besides that of each component, `reward/<name>`: no component may have such a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

STATUSES: Final = ("ok", "wrong", "unparseable", "truncated", "timeout", "error")
"""What the rules say of an output."""


class RewardMetric:
    """Hold whole names of metrics."""

    MEAN: Final = "reward/mean"
    MISSING: Final = "reward/missing"
    SCREENED: Final = "reward/screened"
    FAULTS: Final = "reward/faults"
    FAILED: Final = "reward/failed"
    MODEL: Final = "reward/model"
    PROCESS: Final = "reward/process"
    RULE: Final = "reward/rule"
    MASKED: Final = "reward/frac_masked"
    ALL_CORRECT: Final = "reward/frac_all_correct"
    ALL_WRONG: Final = "reward/frac_all_wrong"
    DEGENERATE_GROUPS: Final = "reward/frac_degenerate_groups"
    STD_WITHIN_GROUP: Final = "reward/std_within_group"
    STEPS_MEAN: Final = "reward/steps_mean"
    KL_PENALTY: Final = "reward/kl_penalty"
    PAIRS: Final = "reward/pairs"


def status_metric(status: str) -> str:
    """Return the metric of the share of outputs with a status."""
    return f"reward/status_{status}"


def gauge_metrics(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return `rm/<gauge>` of each gauge, `rm/<gauge>_low` and `_high` of those with an interval; undefined ones have none."""
    columns = {"": "value", "_low": "low", "_high": "high"}
    found = {f"rm/{gauge}{end}": row[name] for gauge, row in measured.items() for end, name in columns.items()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


_NAMED: Final = [name for key, name in vars(RewardMetric).items() if key.isupper()]
RESERVED: Final = frozenset(
    metric.removeprefix("reward/") for metric in (*_NAMED, *(status_metric(status) for status in STATUSES))
)
"""Names that a component may not have."""
