"""Scores by code that may fail or hang, functions and patterns: in calls of a bounded size, the failing ones in halves."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, assert_never

from pipeline.config import ConfigError
from pipeline.residency import resident
from pipeline.workers.functions import FunctionSource, find_source, require_callable
from pipeline.workers.pool import KillablePool, Outcome
from stages.reward.composition import ComponentScore, Output
from stages.reward.config import AccuracyConfig, FormatConfig, FunctionConfig, RewardConfig
from stages.reward.function_worker import call_function, prepare_calls
from stages.reward.rules.accuracy import VERIFIER_MODULES
from stages.reward.rules.format import is_quick, match_pattern
from stages.reward.rules.prose import tail

ROWS_PER_CALL = 16


class AnswerError(ConfigError):
    """A function that does not answer with one number, or None, for each output."""


@dataclass(frozen=True)
class FunctionScore:
    """What such code says of one output: a score, an abstention (neither score nor fault), or a fault."""

    score: float | None = None
    fault: Literal["timeout", "error"] | None = None
    detail: str = ""


def call_in_pieces(
    call: Callable[[Any, Mapping[str, list[Any]]], list[float | None] | str],
    subject: Any,
    columns: Mapping[str, Sequence[Any]],
    units: Sequence[Sequence[int]],
    *,
    pool: KillablePool,
    deadline_s: float,
    patience_s: float,
) -> list[FunctionScore]:
    """Return one result per row, in order, always.

    Args:
        call: what runs in a worker; from `subject` and the columns of its rows it makes a score of each row, None for no
            score; or says why it cannot have any, which no smaller call would change.
        subject: what it is called with before the columns: the source of a function, a pattern.
        columns: by name, one value per row.
        units: the rows, in parts that a call must hold whole.
        pool: where it runs.
        deadline_s: seconds for one call.
        patience_s: seconds for all calls that repeat a part of one that failed.

    Raises:
        AnswerError: an answer that is not one number, or None, for each row.
    """
    scores = [FunctionScore()] * sum(map(len, units))

    def attempt(calls: Sequence[_Call]) -> list[_Call]:
        """Make the calls, keep their scores, and return the halves of those that failed."""
        tasks = [
            (subject, {name: [column[row] for row in _rows(held)] for name, column in columns.items()})
            for held in calls
        ]
        outcomes = pool.run(call, tasks, deadline_s=deadline_s)
        for held, outcome in zip(calls, outcomes, strict=True):
            for row, score in zip(_rows(held), _scores(outcome, len(_rows(held))), strict=True):
                scores[row] = score
        return [half for held, outcome in zip(calls, outcomes, strict=True) if outcome.fault for half in _halves(held)]

    left = attempt(_packed(units))
    until = time.monotonic() + patience_s
    # No more at once than fit into what is left of the patience if all of them miss their deadline.
    while left and (room := int((until - time.monotonic()) / deadline_s * pool.workers)) > 0:
        left = left[room:] + attempt(left[:room])
    return scores


_Call = Sequence[Sequence[int]]
"""The units of rows that one call holds."""


def _packed(units: Sequence[Sequence[int]]) -> list[_Call]:
    """Return calls of as many units as fit into 16 rows, at least one."""
    calls: list[list[Sequence[int]]] = []
    for unit in units:
        if not calls or len(_rows(calls[-1])) + len(unit) > ROWS_PER_CALL:
            calls.append([])
        calls[-1].append(unit)
    return list(calls)


def _halves(call: _Call) -> list[_Call]:
    """Return the halves of a call; a unit that fails alone is not called again."""
    middle = len(call) // 2
    return [call[:middle], call[middle:]] if middle else []


def _rows(call: _Call) -> list[int]:
    return [row for unit in call for row in unit]


def _scores(outcome: Outcome, rows: int) -> list[FunctionScore]:
    if outcome.fault is not None:
        together = f"in a call with {rows} outputs: " if rows > 1 else ""
        fault: Literal["timeout", "error"] = "timeout" if outcome.fault == "timeout" else "error"
        return [FunctionScore(None, fault, together + outcome.detail)] * rows
    # The worker ran code that may have changed what its own checks are made of.
    found = outcome.value
    if not isinstance(found, list) or len(found) != rows or not all(type(s) in (float, NoneType) for s in found):
        raise AnswerError(found if isinstance(found, str) else f"expected {rows} numbers, found {found!r:.100}")
    return [
        FunctionScore(score)
        if score is None or math.isfinite(score)
        else FunctionScore(None, "error", f"expected a finite number or None, found {score}")
        for score in found
    ]


_PATTERN_PATIENCE_S = 60.0
"""Seconds that a batch may spend on finding out which of its outputs a pattern hangs on; as for functions."""


class RewardFunctionError(RuntimeError):
    """A reward function failed on too many outputs; names it, the first rows and why."""


def score_by_pattern(rows: Sequence[Output], component: FormatConfig, config: RewardConfig) -> list[ComponentScore]:
    """Score 1 where the user's regular expression is found; no score where that took too long: it may backtrack for ever."""
    pattern, endings = component.pattern or "", [tail(row.text) for row in rows]
    if not rows or is_quick(pattern):
        return [ComponentScore(score) for score in match_pattern(pattern, {"texts": endings})]
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
    return [ComponentScore(score.score, score.fault) for score in scores]


def score_by_function(rows: Sequence[Output], component: FunctionConfig, config: RewardConfig) -> list[ComponentScore]:
    """Score by the user's function: `ok` above 0, else `wrong`; `unparseable` where it abstains.

    Raises:
        ConfigError: a function that is not there, does not take what it would be given, or answers with no list of scores.
        RewardFunctionError: it failed on more outputs than `config.max_errors` allows.
    """
    if not rows:
        return []
    source = find_source(component.function)
    pool = _function_pool(source, component, config)
    columns = _columns(rows, component)
    require_callable(source, list(columns), pool, "name fewer `columns` or accept **kwargs")
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
    return [ComponentScore(score.score, _status(score)) for score in scores]


def _columns(rows: Sequence[Output], component: FunctionConfig) -> dict[str, list[Any]]:
    """Return the keyword arguments, as TRL passes them; the template around a question is not part of a table."""
    texts = {"prompts": [row.question for row in rows], "completions": [row.text for row in rows]}
    columns: dict[str, list[Any]] = {**texts, "completion_ids": [row.output_ids for row in rows]}
    if component.conversational:
        for name, role in (("prompts", "user"), ("completions", "assistant")):
            columns[name] = [[{"role": role, "content": text}] for text in texts[name]]
    for name in component.columns:
        columns[name] = [getattr(row, name) for row in rows]
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
    """Return what went wrong, in words, for the table has room for a status only; empty where nothing did."""
    faults = [(row, score) for row, score in zip(rows, scores, strict=True) if score.fault is not None]
    if not faults:
        return ""
    first = {score.detail: f"({row.question_id!r}, {row.sample}): {score.detail}" for row, score in reversed(faults)}
    shown = "; ".join(list(first.values())[::-1][:3])
    return f"component {component!r}: no score from {scorer} for {len(faults)} of {len(rows)} outputs, such as {shown}"


def _function_pool(source: FunctionSource, component: FunctionConfig, config: RewardConfig) -> KillablePool:
    """Return a pool of the function's own: what it does to its process, it does not do to the verifier's."""
    preload, prepare = _preload(config), functools.partial(prepare_calls, source)
    return _resident_pool(f"function {component.name}", config, preload, prepare, preload, source)


def _pattern_pool(config: RewardConfig) -> KillablePool:
    return verifier_pool(config) if _preload(config) else _resident_pool("pattern", config)


def _preload(config: RewardConfig) -> tuple[str, ...]:
    """Return what the server that all workers are forked from loads once: what the verifier will need, if it will."""
    verified = any(isinstance(each, AccuracyConfig) and each.verifier != "exact" for each in config.components)
    return VERIFIER_MODULES if verified else ()


def verifier_pool(config: RewardConfig) -> KillablePool:
    """Return the processes in which math-verify compares; none is started before it has something to compare."""
    return _resident_pool("verifier", config, VERIFIER_MODULES)


def _resident_pool(
    name: str,
    config: RewardConfig,
    preload: tuple[str, ...] = (),
    prepare: Callable[[], object] | None = None,
    *key: Any,
) -> KillablePool:
    def make() -> KillablePool:
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb, preload=preload, prepare=prepare)

    return resident(name, (config.workers, config.memory_mb, *key), make)
