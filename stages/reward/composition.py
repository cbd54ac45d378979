"""One reward from the scores of its components, with a declared meaning for a score that is missing; and their metrics."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from stages.reward.config import AccuracyConfig, ComponentConfig, Missing, OverlongConfig, RewardConfig, StepsConfig
from stages.reward_metrics import STATUSES, RewardMetric, status_metric


@dataclass(frozen=True)
class StepLabels:
    """The K steps of one output."""

    rewards: list[float]
    """r^index(j): 1.0 or 0.0."""
    ends: list[int]
    """index(j): the token that ends step j."""
    answer_right: bool | None
    """Whether the answer line states the true answer; None where there is none."""


@dataclass(frozen=True)
class Output:
    """What a component sees of a row."""

    question_id: str
    sample: int
    question: str
    answer: str
    solution: str | None
    text: str
    output_ids: Sequence[int]
    text_ends: Sequence[int]
    """One per token."""
    finish_reason: str
    written: Sequence[bool] | None = None
    """Whether the policy wrote each token; None: it wrote all."""

    @property
    def completion_mask(self) -> list[int]:
        """Return 1 for each token that the policy wrote, 0 for one of its environment."""
        return [1] * len(self.output_ids) if self.written is None else [int(own) for own in self.written]

    @property
    def truncated(self) -> bool:
        """Return whether the length limit cut it."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class ComponentScore:
    """One component's result for one output; `status` and `extracted` only from components that read the answer."""

    score: float | None
    status: str | None = None
    extracted: str | None = None
    screened: bool = False
    steps: StepLabels | None = None


@dataclass(frozen=True)
class Part:
    """One component's contribution to one output."""

    score: float | None
    weight: float
    missing: Missing


def compose(parts: Sequence[Part]) -> float | None:
    """Return the weighted sum of the scores; None where a component that decides has none.

        r = sum_j w_j s_j

    `zero` counts a missing score as 0. `rescale` leaves the component out and scales the rest to the same total weight, so
    that an output is not punished for a component's silence. Where nothing is left there is no reward, never 0.
    """
    if any(part.score is None and part.missing == "no_reward" for part in parts):
        return None
    counted = [part for part in parts if part.score is not None or part.missing == "zero"]
    total = sum(part.weight * (part.score or 0.0) for part in counted)
    if len(counted) == len(parts):
        return total
    weight_left = sum(part.weight for part in counted)
    return total * sum(part.weight for part in parts) / weight_left if weight_left else None


def compose_steps(steps: Sequence[float], weight: float, others: Sequence[Part]) -> list[float] | None:
    """Return the rewards of an output's steps, for process supervision; None where a component that decides has no score.

        r_j = w s_j,   and at the last step   r_K = w s_K + sum_k w_k s_k

    The sum is over what is known of the output as a whole (`others`: its form, language, length): it is paid where the output
    ends. Ours: the paper supervises by steps alone (DeepSeekMath, 4.1.3). A missing score counts as in `compose`.
    """
    silent = [replace(part, score=None if part.score is None else 0.0) for part in others]
    last = len(steps) - 1
    rewards = [
        compose([Part(step, weight, "no_reward"), *(others if place == last else silent)])
        for place, step in enumerate(steps)
    ]
    known = [reward for reward in rewards if reward is not None]
    return known if len(known) == len(rewards) else None


def answer_component(config: RewardConfig) -> ComponentConfig:
    """Return the first component that reads answers: the row has its status, and reward models their labels, from it."""
    reading = [component for component in config.components if not isinstance(component, OverlongConfig)]
    return next((component for component in reading if isinstance(component, AccuracyConfig)), reading[0])


def labels_only(config: RewardConfig) -> RewardConfig:
    """Return the rules that a reward model learns from and is measured by: right answers and steps, no form or length."""
    others = unlearned_components(config)
    kept = tuple(component for component in config.components if component not in others)
    return config.model_copy(update={"components": kept}) if others else config


def unlearned_components(config: RewardConfig) -> tuple[ComponentConfig, ...]:
    """Return the components that add to a model's score: all but those that its labels come from."""
    own = answer_component(config)
    return tuple(part for part in config.components if part != own and not isinstance(part, StepsConfig))


def outcome_components(config: RewardConfig) -> tuple[ComponentConfig, ...]:
    """Return what adds to the last step's reward under process supervision: all but the answer's verdict and steps."""
    return tuple(part for part in config.components if not isinstance(part, AccuracyConfig | StepsConfig))


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
        self, rewards: Sequence[float | None], statuses: Sequence[str], columns: Mapping[str, Sequence[ComponentScore]]
    ) -> None:
        """Count some outputs: their rewards, statuses, and what each component says of each."""
        self._statuses.update(statuses)
        self._rewards.extend(reward for reward in rewards if reward is not None)
        for name, column in columns.items():
            self._scores[name].extend(result.score for result in column if result.score is not None)
            for result in column:
                if result.steps:
                    self._step_rewards.setdefault(name, array("d")).extend(result.steps.rewards)
                self._screened += result.screened
                self._faults += result.status in _FAULTS
            if name in self._failed:
                self._failed[name] += sum(result.status in _FAULTS for result in column)

    def metrics(self) -> dict[str, float]:
        """Return the means over what has a number, a component's over its step rewards where it has any; shares of all outputs.

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
