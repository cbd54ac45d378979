"""Choose how many questions and outputs a step has, and how many steps, by planning the run: memory first, then patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from flows.config import IterativeRLConfig
from flows.planning.plan import Plan, plan_of, remedy_for
from flows.planning.request import Request, room_for_checkpoint, subject_of
from flows.runs.paths import Places
from flows.wording import size
from pipeline.config import ConfigError

_CPU: Final = ((16, 8), (8, 8), (8, 4), (4, 4))
"""Questions and outputs of each, from the most; below four outputs most groups have equal rewards. Ours."""
_GPU: Final = ((64, 16), (64, 8), (32, 8), (16, 8), (8, 8))
_FEWEST_STEPS: Final = 8
"""Steps that should fit into the time given, before more outputs a step are worth it; ours."""
_MOST_STEPS: Final = 200


@dataclass(frozen=True)
class Sizes:
    """What a run is to have, and its plan."""

    settings: Mapping[str, Any]
    """By dotted key."""
    plan: Plan
    remedies: tuple[str, ...]
    """What was changed so that it fits the memory, in words."""


def sizes_for(config: IterativeRLConfig, places: Places, request: Request, *, questions: int, minutes: float) -> Sizes:
    """Return the largest step that fits the memory, and several times into the minutes.

    Raises:
        ConfigError: nothing fits the memory, or no checkpoint fits the disk.
    """
    subject = subject_of(config, places, request)
    if lacking := room_for_checkpoint(subject):
        raise ConfigError(lacking)
    last: Sizes | None = None
    for asked, group in _GPU if subject.given.gpu else _CPU:
        settings: dict[str, Any] = {"questions_per_step": min(asked, questions), "rollout.G": group}
        made = plan_of(replace(subject.given, config=subject.given.config.override(settings)))
        taken, made = remedy_for(made)
        if made.missing > 0:
            continue
        for change in taken:
            settings |= change.settings
        last = Sizes(settings, made, tuple(change.text for change in taken))
        if _steps(made, minutes) >= _FEWEST_STEPS:
            break
    if last is None:
        least = plan_of(subject.given)
        raise ConfigError(
            f"the model does not fit: the smallest step needs more than the {size(subject.given.machine.memory)} of this "
            f"machine, and a step of {config.questions_per_step} x {config.rollout.G} outputs {size(least.peak)}; take a "
            "smaller model"
        )
    settings = {**last.settings, "steps": max(1, min(_MOST_STEPS, _steps(last.plan, minutes)))}
    made = plan_of(replace(subject.given, config=subject.given.config.override(settings)))
    return replace(last, settings=settings, plan=made)


def _steps(plan: Plan, minutes: float) -> int:
    """Return how many steps the minutes hold, less what is done once and the evaluations."""
    step, _ = plan.of_a_step()
    rest = plan.seconds - step * plan.counts["step"]
    return int(max(0.0, 60 * minutes - rest) / step)
