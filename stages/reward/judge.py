"""What each component says of each output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from pipeline.residency import resident
from stages.identity import DataError
from stages.reward.config import (
    AccuracyConfig,
    ComponentConfig,
    FormatConfig,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
)
from stages.reward.pool import KillablePool
from stages.reward.rules.accuracy import VERIFIER_MODULES, grade_answers
from stages.reward.rules.form import has_form
from stages.reward.rules.length import overlong_score
from stages.reward.rules.steps import StepLabels, label_steps

__all__ = ["Judged", "Output", "judge"]


@dataclass(frozen=True)
class Output:
    """What a component sees of a row."""

    question_id: str
    sample: int
    question: str
    gold: str
    text: str
    text_ends: Sequence[int]
    """One per token, so that its length is that of the output."""
    truncated: bool


@dataclass(frozen=True)
class Judged:
    """One component's result for one output; `status` and `extracted` only from components that read the answer."""

    score: float | None
    status: str | None = None
    extracted: str | None = None
    screened: bool = False
    steps: StepLabels | None = None


def judge(rows: Sequence[Output], component: ComponentConfig, config: RewardConfig) -> list[Judged]:
    """One result per row, in order, always; truncated outputs as `config` declares.

    Raises:
        DataError: step rewards of a question that is not of the built-in world.
        ValueError: a component that scores NaN or infinity, with the row.
    """
    # Where being truncated settles the score, nothing is verified.
    open_rows = [i for i, row in enumerate(rows) if not row.truncated or not _settled(component, config)]
    found = [Judged(None if config.truncated == "no_reward" else 0.0, "truncated")] * len(rows)
    for place, judged in zip(open_rows, _score([rows[i] for i in open_rows], component, config), strict=True):
        found[place] = judged
    for row, judged in zip(rows, found, strict=True):
        if judged.score is not None and not math.isfinite(judged.score):
            raise ValueError(
                f"component {component.name!r} scored ({row.question_id!r}, {row.sample}) with {judged.score}; expected a "
                "finite number, or none for a missing score"
            )
    if config.truncated == "as_unparseable":
        return [_cut(judged, component) if row.truncated else judged for row, judged in zip(rows, found, strict=True)]
    return found


def _settled(component: ComponentConfig, config: RewardConfig) -> bool:
    """Whether a truncated output's result does not depend on what it says."""
    match config.truncated:
        case "no_reward":
            return True
        case "as_is":
            return False
        case "as_unparseable":
            return isinstance(component, AccuracyConfig | FormatConfig)
        case _:
            assert_never(config.truncated)


def _cut(judged: Judged, component: ComponentConfig) -> Judged:
    """A truncated output's result: its text scores 0, its length and its step labels stay."""
    score = judged.score if isinstance(component, OverlongConfig) else 0.0
    return replace(judged, score=score, status="truncated")


def _score(rows: Sequence[Output], component: ComponentConfig, config: RewardConfig) -> list[Judged]:
    match component:
        case AccuracyConfig():
            grades = grade_answers(
                [(row.gold, row.text) for row in rows],
                conventions=component.conventions,
                verifier=component.verifier,
                pool=_verifier_pool(config),
                deadline_s=config.deadline_s,
            )
            return [Judged(grade.score, grade.status, grade.extracted, grade.screened) for grade in grades]
        case FormatConfig():
            return [Judged(float(has_form(row.text, component.form, component.pattern))) for row in rows]
        case StepsConfig():
            return [_judge_steps(row, component) for row in rows]
        case OverlongConfig():
            limits = {"max_tokens": component.max_tokens, "buffer_tokens": component.buffer_tokens}
            return [Judged(overlong_score(len(row.text_ends), **limits)) for row in rows]
        case _:
            assert_never(component)


def _judge_steps(row: Output, component: StepsConfig) -> Judged:
    try:
        steps = label_steps(row.question, row.text, row.text_ends, component.credit)
    except DataError as error:
        raise DataError(
            f"component {component.name!r} has labels for the built-in world only; question {row.question_id!r}: {error}"
        ) from None
    status = "unparseable" if steps.answer_right is None else "ok" if steps.answer_right else "wrong"
    return Judged(sum(steps.rewards) / max(len(steps.rewards), 1), status, steps=steps)


def _verifier_pool(config: RewardConfig) -> KillablePool:
    def make() -> KillablePool:
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb, preload=VERIFIER_MODULES)

    return resident("verifier", (config.workers, config.memory_mb), make)
