"""Process labels: the lines of an output of the built-in world, each with its verdict and the token that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.environment import check_solution
from stages.text import step_ends

__all__ = ["Credit", "StepLabels", "label_steps"]

Credit = Literal["right", "consistent"]


@dataclass(frozen=True)
class StepLabels:
    """The K steps of one output."""

    rewards: list[float]
    """r^index(j): 1.0 or 0.0."""
    ends: list[int]
    """index(j): the token that ends step j."""
    answer_right: bool | None
    """Whether the answer line states the true answer; None where there is none."""


def label_steps(question: str, text: str, text_ends: Sequence[int], credit: Credit) -> StepLabels:
    """One step per line that is not empty; the last one reaches to the last token.

    Args:
        question: a question of the built-in world.
        text: the output.
        text_ends: for each of its tokens the length of `text` once that token is decoded.
        credit: which verdict on a line is worth 1.

    Raises:
        DataError: a question of another world.
    """
    checks = check_solution(question, text)
    if not text_ends:
        return StepLabels([], [], None)
    rewards = [float(check.right if credit == "right" else check.consistent) for check in checks]
    finals = [check.right for check in checks if check.final]
    # An output without any line is one step of no reward.
    return StepLabels(rewards or [0.0], step_ends(text, text_ends), finals[0] if finals else None)
