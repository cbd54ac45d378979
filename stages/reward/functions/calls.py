"""Scores of a reward function for a batch: in calls of a bounded size, the failing ones in halves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import ConfigError
from stages.reward.functions.source import FunctionSource
from stages.reward.functions.worker import call_function, objection_to
from stages.reward.pool import KillablePool, Outcome

__all__ = ["FunctionScore", "call_in_pieces", "require_callable"]

ROWS_PER_CALL = 16
_CHECK_S = 30.0


@dataclass(frozen=True)
class FunctionScore:
    """What a reward function says of one output: a score, an abstention (neither score nor fault), or a fault."""

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
    source: FunctionSource,
    columns: Mapping[str, Sequence[Any]],
    units: Sequence[Sequence[int]],
    *,
    pool: KillablePool,
    deadline_s: float,
    patience_s: float,
) -> list[FunctionScore]:
    """One result per row, in order, always.

    Args:
        source: the function.
        columns: its arguments, one value per row.
        units: the rows, in parts that a call must hold whole.
        pool: where it runs.
        deadline_s: seconds for one call.
        patience_s: seconds for all calls that repeat a part of one that failed.
    """
    scores = [FunctionScore()] * sum(map(len, units))

    def attempt(calls: Sequence[_Call]) -> list[_Call]:
        """Make the calls, keep their scores, and return the halves of those that failed."""
        tasks = [
            (source, {name: [column[row] for row in _rows(call)] for name, column in columns.items()}) for call in calls
        ]
        outcomes = pool.run(call_function, tasks, deadline_s=deadline_s)
        for call, outcome in zip(calls, outcomes, strict=True):
            for row, score in zip(_rows(call), _scores(outcome, len(_rows(call))), strict=True):
                scores[row] = score
        return [half for call, outcome in zip(calls, outcomes, strict=True) if outcome.fault for half in _halves(call)]

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
    return [FunctionScore(score, "error" if problem else None, problem or "") for score, problem in outcome.value]
