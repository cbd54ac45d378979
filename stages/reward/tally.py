"""The metrics of a reward stage, gathered a chunk of outputs at a time: the same for any chunks."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from stages.reward.judge import Judged
from stages.reward_metrics import STATUSES, RewardMetric, status_metric

__all__ = ["STATUSES", "Tally"]

_FAULTS: Final = ("timeout", "error")
"""Statuses of a component that could not be asked."""


class Tally:
    """Counts, and of each mean all its numbers (8 bytes each): their sum is exact, whatever their order."""

    def __init__(self, components: Sequence[str], functions: Sequence[str] = ()) -> None:
        self._statuses: Counter[str] = Counter()
        self._rewards = array("d")
        self._scores = {name: array("d") for name in components}
        self._step_rewards: dict[str, array[float]] = {}
        self._failed = dict.fromkeys(functions, 0)
        self._screened = self._faults = 0

    def take(
        self, rewards: Sequence[float | None], statuses: Sequence[str], columns: Mapping[str, Sequence[Judged]]
    ) -> None:
        """Count some outputs: their rewards, statuses, and what each component says of each."""
        self._statuses.update(statuses)
        self._rewards.extend(reward for reward in rewards if reward is not None)
        for name, column in columns.items():
            self._scores[name].extend(judged.score for judged in column if judged.score is not None)
            for judged in column:
                if judged.steps:
                    self._step_rewards.setdefault(name, array("d")).extend(judged.steps.rewards)
                self._screened += judged.screened
                self._faults += judged.status in _FAULTS
            if name in self._failed:
                self._failed[name] += sum(judged.status in _FAULTS for judged in column)

    def metrics(self) -> dict[str, float]:
        """Means over what has a number, a component's over its step rewards where it has any; shares of all outputs.

        `reward/failed`, where there are functions: the share that one of them failed on, the largest.
        """
        outputs = self._statuses.total()
        rows = max(outputs, 1)
        means = {f"reward/{name}": self._step_rewards.get(name, scores) for name, scores in self._scores.items()}
        # No number is better than NaN: a chart shows the gap.
        known = {name: values for name, values in ({RewardMetric.MEAN: self._rewards} | means).items() if values}
        return (
            {name: math.fsum(values) / len(values) for name, values in known.items()}
            | {status_metric(status): self._statuses[status] / rows for status in STATUSES}
            | {
                RewardMetric.MISSING: (outputs - len(self._rewards)) / rows,
                RewardMetric.SCREENED: self._screened / rows,
                RewardMetric.FAULTS: self._faults / rows,
            }
            | ({RewardMetric.FAILED: max(self._failed.values()) / rows} if self._failed else {})
        )
