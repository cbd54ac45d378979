"""One reward from the scores of its components, with a declared meaning for a score that is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.reward.config import (
    AccuracyConfig,
    ComponentConfig,
    Missing,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
)

__all__ = ["Part", "answer_component", "beside_labels", "beside_steps", "compose", "compose_steps", "labels_only"]


@dataclass(frozen=True)
class Part:
    """One component's contribution to one output."""

    score: float | None
    weight: float
    missing: Missing


def compose(parts: Sequence[Part]) -> float | None:
    """Weighted sum of the scores; None where a component that decides has none.

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
    """Rewards of the steps of an output, for process supervision; None where a component that decides has no score.

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
    """The component whose status is the row's, and that reward models have their labels from: the first that reads answers."""
    reading = [component for component in config.components if not isinstance(component, OverlongConfig)]
    return next((component for component in reading if isinstance(component, AccuracyConfig)), reading[0])


def labels_only(config: RewardConfig) -> RewardConfig:
    """The rules that a reward model learns from and is measured by: right answers, right steps, and no form or length."""
    beside = beside_labels(config)
    kept = tuple(component for component in config.components if component not in beside)
    return config.model_copy(update={"components": kept}) if beside else config


def beside_labels(config: RewardConfig) -> tuple[ComponentConfig, ...]:
    """The components that add to a model's score: all but those that its labels come from, which the score stands for."""
    own = answer_component(config)
    return tuple(part for part in config.components if part != own and not isinstance(part, StepsConfig))


def beside_steps(config: RewardConfig) -> tuple[ComponentConfig, ...]:
    """The components that add to the last step's reward under process supervision: all but the answer's verdict and steps."""
    return tuple(part for part in config.components if not isinstance(part, AccuracyConfig | StepsConfig))
