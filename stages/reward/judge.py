"""What each component says of each output."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

from pipeline.config import ConfigError
from pipeline.residency import resident
from stages.identity import DataError
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
from stages.reward.functions.calls import AnswerError, FunctionScore, call_in_pieces, require_callable
from stages.reward.functions.source import FunctionSource, find_source
from stages.reward.functions.worker import call_function, load_function
from stages.reward.pool import KillablePool
from stages.reward.rules.accuracy import VERIFIER_MODULES, grade_answers
from stages.reward.rules.extraction import LAST_CHARACTERS, outside_thinking, tail
from stages.reward.rules.form import has_form, is_quick, match_pattern
from stages.reward.rules.language import is_coherent
from stages.reward.rules.length import overlong_score
from stages.reward.rules.steps import StepLabels, label_steps

__all__ = ["Judged", "Output", "RewardFunctionError", "judge", "verifier_pool"]

_PATTERN_PATIENCE_S = 60.0
"""Seconds that a batch may spend on finding out which of its outputs a pattern hangs on; as for functions."""


class RewardFunctionError(RuntimeError):
    """A reward function failed on too many outputs; names it, the first rows and why."""


@dataclass(frozen=True)
class Output:
    """What a component sees of a row."""

    question_id: str
    sample: int
    question: str
    gold: str
    solution: str | None
    text: str
    output_ids: Sequence[int]
    text_ends: Sequence[int]
    """One per token."""
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut it."""
        return self.finish_reason == "length"


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
        ConfigError: a reward function that cannot be called, or that does not answer with a number for each output.
        RewardFunctionError: a reward function that failed on more outputs than `config.max_errors` allows.
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
            return isinstance(component, AccuracyConfig | FormatConfig | LanguageConfig | FunctionConfig)
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
                [(row.gold, _read(row.text, config)) for row in rows],
                conventions=component.conventions,
                mark=component.mark,
                verifier=component.verifier,
                pool=verifier_pool(config),
                deadline_s=config.deadline_s,
            )
            return [Judged(grade.score, grade.status, grade.extracted, grade.screened) for grade in grades]
        case FormatConfig():
            form = component.form
            if form == "pattern":
                return _judge_by_pattern(rows, component, config)
            return [Judged(float(has_form(_read(row.text, config), form))) for row in rows]
        case StepsConfig():
            return [_judge_steps(row, component) for row in rows]
        case LanguageConfig():
            limits = component.model_dump(include={"max_foreign", "max_run", "max_compression"})
            return [Judged(float(is_coherent(row.question, row.text, **limits))) for row in rows]
        case FunctionConfig():
            return _judge_by_function(rows, component, config)
        case OverlongConfig():
            lengths = {"max_tokens": component.max_tokens, "buffer_tokens": component.buffer_tokens}
            return [Judged(overlong_score(len(row.output_ids), **lengths)) for row in rows]
        case _:
            assert_never(component)


def _read(text: str, config: RewardConfig) -> str:
    """The part of an output in which its answer counts."""
    if config.reads == "last_characters":
        text = text[-(config.last_characters or LAST_CHARACTERS) :]
    if config.thinking is None:
        return text
    return outside_thinking(text, config.thinking.tags, opened=config.thinking.opened_by_prompt)


def _judge_steps(row: Output, component: StepsConfig) -> Judged:
    try:
        steps = label_steps(row.question, row.text, row.text_ends, component.credit)
    except DataError as error:
        raise DataError(
            f"component {component.name!r} has labels for the built-in world only; question {row.question_id!r}: {error}"
        ) from None
    status = "unparseable" if steps.answer_right is None else "ok" if steps.answer_right else "wrong"
    return Judged(sum(steps.rewards) / max(len(steps.rewards), 1), status, steps=steps)


def _judge_by_pattern(rows: Sequence[Output], component: FormatConfig, config: RewardConfig) -> list[Judged]:
    """1 where the user's regular expression is found; no score where that took too long: it may backtrack for ever."""
    pattern, endings = component.pattern or "", [tail(row.text) for row in rows]
    if not rows or is_quick(pattern):
        return [Judged(score) for score in match_pattern(pattern, {"texts": endings})]
    distinct = list(dict.fromkeys(endings))
    found = call_in_pieces(
        match_pattern,
        pattern,
        {"texts": distinct},
        [[place] for place in range(len(distinct))],
        pool=_pattern_pool(config),
        deadline_s=config.deadline_s,
        patience_s=_PATTERN_PATIENCE_S,
    )
    by_ending = dict(zip(distinct, found, strict=True))
    scores = [by_ending[ending] for ending in endings]
    if faults := _faults(rows, scores, component.name, f"the pattern {pattern}"):
        warnings.warn(faults, stacklevel=2)
    return [Judged(score.score, score.fault) for score in scores]


def _judge_by_function(rows: Sequence[Output], component: FunctionConfig, config: RewardConfig) -> list[Judged]:
    """Scores of the user's function: `ok` above 0, else `wrong`; `unparseable` where it abstains.

    Raises:
        ConfigError: a function that is not there, does not take what it would be given, or answers with no list of scores.
        RewardFunctionError: it failed on more outputs than `config.max_errors` allows.
    """
    if not rows:
        return []
    source = find_source(component.function)
    pool = _function_pool(source, component, config)
    columns = _columns(rows, component)
    require_callable(source, list(columns), pool)
    try:
        scores = call_in_pieces(
            call_function,
            source,
            columns,
            _units(rows, component.together),
            pool=pool,
            deadline_s=component.deadline_s,
            patience_s=component.patience_s,
        )
    except AnswerError as error:
        raise ConfigError(f"function {component.function!r} of component {component.name!r}: {error}") from None
    faults = _faults(rows, scores, component.name, component.function)
    if sum(score.fault is not None for score in scores) > config.max_errors * len(rows):
        raise RewardFunctionError(
            f"{faults}. reward.max_errors={config.max_errors:g} is the share of outputs that may fail. No reward was written: "
            "once the cause is gone, the same command asks for all of them again"
        )
    if faults:
        warnings.warn(faults, stacklevel=2)
    return [Judged(score.score, _status(score)) for score in scores]


def _columns(rows: Sequence[Output], component: FunctionConfig) -> dict[str, list[Any]]:
    """The keyword arguments, as TRL passes them; the template around a question is not part of a table."""
    texts = {"prompts": [row.question for row in rows], "completions": [row.text for row in rows]}
    columns: dict[str, list[Any]] = {**texts, "completion_ids": [row.output_ids for row in rows]}
    if component.conversational:
        for name, role in (("prompts", "user"), ("completions", "assistant")):
            columns[name] = [[{"role": role, "content": text}] for text in texts[name]]
    for name in component.columns:
        columns[name] = [row.gold if name == "answer" else getattr(row, name) for row in rows]
    return columns


def _units(rows: Sequence[Output], together: Literal["output", "question", "batch"]) -> list[list[int]]:
    match together:
        case "output":
            return [[place] for place in range(len(rows))]
        case "question":
            units: dict[str, list[int]] = {}
            for place, row in enumerate(rows):
                units.setdefault(row.question_id, []).append(place)
            return list(units.values())
        case "batch":
            return [list(range(len(rows)))]
        case _:
            assert_never(together)


def _status(score: FunctionScore) -> str:
    if score.fault is not None:
        return score.fault
    return "unparseable" if score.score is None else "ok" if score.score > 0 else "wrong"


def _faults(rows: Sequence[Output], scores: Sequence[FunctionScore], component: str, scorer: str) -> str:
    """What went wrong, in words, for the table has room for a status only; empty where nothing did."""
    faults = [(row, score) for row, score in zip(rows, scores, strict=True) if score.fault is not None]
    if not faults:
        return ""
    first = {score.detail: f"({row.question_id!r}, {row.sample}): {score.detail}" for row, score in reversed(faults)}
    shown = "; ".join(list(first.values())[::-1][:3])
    return f"component {component!r}: no score from {scorer} for {len(faults)} of {len(rows)} outputs, such as {shown}"


def _function_pool(source: FunctionSource, component: FunctionConfig, config: RewardConfig) -> KillablePool:
    """A pool of the function's own: what it does to its process, it does not do to the verifier's."""
    preload = _preload(config)

    def make() -> KillablePool:
        prepare = functools.partial(load_function, source)
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb, preload=preload, prepare=prepare)

    return resident(f"function {component.name}", (config.workers, config.memory_mb, preload, source), make)


def _pattern_pool(config: RewardConfig) -> KillablePool:
    preload = _preload(config)
    if preload:
        return verifier_pool(config)

    def make() -> KillablePool:
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb)

    return resident("pattern", (config.workers, config.memory_mb), make)


def _preload(config: RewardConfig) -> tuple[str, ...]:
    """The server that all workers are forked from is started once: with what the verifier will need, if it will."""
    verified = any(isinstance(each, AccuracyConfig) and each.verifier != "exact" for each in config.components)
    return VERIFIER_MODULES if verified else ()


def verifier_pool(config: RewardConfig) -> KillablePool:
    """The processes in which math-verify compares; none is started before it has something to compare."""

    def make() -> KillablePool:
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb, preload=VERIFIER_MODULES)

    return resident("verifier", (config.workers, config.memory_mb), make)
