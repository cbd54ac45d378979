"""Score outputs by each kind of component, and cut outputs of the built-in world into steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, assert_never

from stages.arithmetic import check_solution
from stages.reward.composition import ComponentScore, Output, StepLabels
from stages.reward.config import (
    AccuracyConfig,
    ComponentConfig,
    FormatConfig,
    FunctionConfig,
    LanguageConfig,
    OverlongConfig,
    RewardConfig,
    StepsConfig,
)
from stages.reward.functions import score_by_function, score_by_pattern, verifier_pool
from stages.reward.rules.accuracy import grade_answers
from stages.reward.rules.format import has_form, is_coherent, overlong_score
from stages.reward.rules.prose import LAST_CHARACTERS, outside_thinking
from stages.tables import DataError
from stages.text import step_ends


def score_component(rows: Sequence[Output], component: ComponentConfig, config: RewardConfig) -> list[ComponentScore]:
    """Return one result per row, in order, always; truncated outputs as `config` declares.

    Raises:
        DataError: step rewards of a question that is not of the built-in world.
        ConfigError: a reward function that cannot be called, or that does not answer with a number for each output.
        RewardFunctionError: a reward function that failed on more outputs than `config.max_errors` allows.
        ValueError: a component that scores NaN or infinity, with the row.
    """
    # Where being truncated settles the score, nothing is verified.
    open_rows = [i for i, row in enumerate(rows) if not row.truncated or not _settled(component, config)]
    found = [ComponentScore(None if config.truncated == "no_reward" else 0.0, "truncated")] * len(rows)
    for place, result in zip(open_rows, _score([rows[i] for i in open_rows], component, config), strict=True):
        found[place] = result
    for row, result in zip(rows, found, strict=True):
        if result.score is not None and not math.isfinite(result.score):
            raise ValueError(
                f"component {component.name!r} scored ({row.question_id!r}, {row.sample}) with {result.score}; expected a "
                "finite number, or none for a missing score"
            )
    if config.truncated == "as_unparseable":
        return [_cut(result, component) if row.truncated else result for row, result in zip(rows, found, strict=True)]
    return found


def _settled(component: ComponentConfig, config: RewardConfig) -> bool:
    """Return whether a truncated output's result does not depend on what it says."""
    match config.truncated:
        case "no_reward":
            return True
        case "as_is":
            return False
        case "as_unparseable":
            return isinstance(component, AccuracyConfig | FormatConfig | LanguageConfig | FunctionConfig)
        case _:
            assert_never(config.truncated)


def _cut(result: ComponentScore, component: ComponentConfig) -> ComponentScore:
    """Return a truncated output's result: its text scores 0, its length and its step labels stay."""
    score = result.score if isinstance(component, OverlongConfig) else 0.0
    return replace(result, score=score, status="truncated")


def _score(rows: Sequence[Output], component: ComponentConfig, config: RewardConfig) -> list[ComponentScore]:
    match component:
        case AccuracyConfig():
            grades = grade_answers(
                [(row.answer, _read(row.text, config)) for row in rows],
                conventions=component.conventions,
                mark=component.mark,
                verifier=component.verifier,
                pool=verifier_pool(config),
                deadline_s=config.deadline_s,
            )
            return [ComponentScore(grade.score, grade.status, grade.extracted, grade.screened) for grade in grades]
        case FormatConfig():
            form = component.form
            if form == "pattern":
                return score_by_pattern(rows, component, config)
            return [ComponentScore(float(has_form(_read(row.text, config), form))) for row in rows]
        case StepsConfig():
            return [_score_steps(row, component) for row in rows]
        case LanguageConfig():
            limits = component.model_dump(include={"max_foreign", "max_run", "max_compression"})
            return [ComponentScore(float(is_coherent(row.question, row.text, **limits))) for row in rows]
        case FunctionConfig():
            return score_by_function(rows, component, config)
        case OverlongConfig():
            lengths = {"max_tokens": component.max_tokens, "buffer_tokens": component.buffer_tokens}
            return [ComponentScore(overlong_score(sum(row.completion_mask), **lengths)) for row in rows]
        case _:
            assert_never(component)


def _read(text: str, config: RewardConfig) -> str:
    """Return the part of an output in which its answer counts."""
    if config.reads == "last_characters":
        text = text[-(config.last_characters or LAST_CHARACTERS) :]
    if config.thinking is None:
        return text
    return outside_thinking(text, config.thinking.tags, opened=config.thinking.opened_by_prompt)


def _score_steps(row: Output, component: StepsConfig) -> ComponentScore:
    try:
        steps = label_steps(row.question, row.text, row.text_ends, component.credit)
    except DataError as error:
        raise DataError(
            f"component {component.name!r} has labels for the built-in world only; question {row.question_id!r}: {error}"
        ) from None
    status = "unparseable" if steps.answer_right is None else "ok" if steps.answer_right else "wrong"
    return ComponentScore(sum(steps.rewards) / max(len(steps.rewards), 1), status, steps=steps)


Credit = Literal["right", "consistent"]


def label_steps(question: str, text: str, text_ends: Sequence[int], credit: Credit) -> StepLabels:
    """Return one step per line that is not empty; the last one reaches to the last token.

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
