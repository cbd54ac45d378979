"""Metrics of rewards that stages log besides that of each component, `reward/<name>`: no component may have such a name."""

from __future__ import annotations

from typing import Final

STATUSES: Final = ("ok", "wrong", "unparseable", "truncated", "timeout", "error")
"""What the rules say of an output."""


class RewardMetric:
    """Whole names of metrics."""

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
    """The metric of the share of outputs with a status."""
    return f"reward/status_{status}"


_NAMED: Final = [name for key, name in vars(RewardMetric).items() if key.isupper()]
RESERVED: Final = frozenset(
    metric.removeprefix("reward/") for metric in (*_NAMED, *(status_metric(status) for status in STATUSES))
)
"""Names that a component may not have."""
