"""Scores for a batch by code that may fail or hang: in calls of a bounded size, the failing ones in halves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from pipeline.config import ConfigError
from stages.reward.functions.source import FunctionSource
from stages.reward.functions.worker import objection_to
from stages.reward.pool import KillablePool, Outcome

__all__ = ["AnswerError", "FunctionScore", "call_in_pieces", "require_callable"]

ROWS_PER_CALL = 16
_CHECK_S = 30.0


class AnswerError(ConfigError):
    """A function that does not answer with one number, or None, for each output."""


@dataclass(frozen=True)
class FunctionScore:
    """What such code says of one output: a score, an abstention (neither score nor fault), or a fault."""

    score: float | None = None
    fault: Literal["timeout", "error"] | None = None
    detail: str = ""


def require_callable(source: FunctionSource, arguments: Sequence[str], pool: KillablePool) -> None:
    """Refuse a function that could not score anything, before it is called.

    Raises:
        ConfigError: a module that does not import, a name it does not have, or a signature that does not take `arguments`.
    """
    outcome = pool.run(objection_to, [(source, tuple(arguments))], deadline_s=_CHECK_S)[0]
    objection = outcome.value if outcome.fault is None else f"{outcome.fault}: {outcome.detail}"
    if objection is not None:
        raise ConfigError(f"function '{source.module}:{source.name}' in {source.file}: {objection}")


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
    """One result per row, in order, always.

    Args:
        call: what runs in a worker; from `subject` and the columns of its rows it makes a score of each row, None for no
            score; or says why it cannot have any, which no smaller call would change.
        subject: what it is called with beside the columns: the source of a function, a pattern.
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
    """Calls of as many units as fit into 16 rows, at least one."""
    calls: list[list[Sequence[int]]] = []
    for unit in units:
        if not calls or len(_rows(calls[-1])) + len(unit) > ROWS_PER_CALL:
            calls.append([])
        calls[-1].append(unit)
    return list(calls)


def _halves(call: _Call) -> list[_Call]:
    """A unit that fails alone is not called again."""
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
