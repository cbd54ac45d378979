"""Answer the calls of outputs that wait for one."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, assert_never, get_args

from pipeline.stage import record_metrics, stage
from stages.environment.answers import Answer, Dialogue, Environment, Status
from stages.environment.calculator import Calculator
from stages.environment.config import (
    CalculatorConfig,
    EnvironmentConfig,
    FunctionConfig,
    OpenEnvConfig,
    PythonConfig,
    ToolCallsConfig,
    VerifiersConfig,
)
from stages.environment.function import Function, Verifiers
from stages.environment.openenv import OpenEnv
from stages.join import KEY, align, turns_of
from stages.tables import Questions, Rollouts, ToolCalls

_MANY: Final = 8
"""Calls of a turn that a policy seldom gets wrong all together."""


@stage(version="2")
def answer_calls(
    outputs: Rollouts, questions: Questions, earlier: ToolCalls | None, config: EnvironmentConfig
) -> ToolCalls:
    """Answer every output that waits for its environment (finish reason `call`); return all calls so far.

    An answer is a function of what is recorded: the question, the turns of the output, and its earlier calls.

    Args:
        outputs: of `rollout` or `continue_dialogues`; the last turn of those that wait ends in a call.
        questions: of the outputs.
        earlier: the calls of the turns before; None at the first.

    Metrics, of all turns so far: `tool/calls`, `tool/calls_mean` (of an output), `tool/used_rate` (outputs with a call);
    `tool/ok_rate`, `tool/error_rate`, `tool/timeout_rate`, `tool/memory_rate`, `tool/refused_rate` (of calls; null without
    any); `time/tools` (seconds).

    Warns where each of eight or more calls of a turn failed.

    Raises:
        JoinError: an output without its question.
    """
    table = outputs.read([*KEY, "finish_reason", "text", "text_ends", "turns"])
    asked = align(table, questions.read(), "questions", by=["question_id"], several=True, extra=True).to_pylist()
    rows: list[dict[str, Any]] = earlier.rows() if earlier else []
    before: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["turn"]):
        before.setdefault((row["question_id"], row["sample"]), []).append(row)
    waiting = [
        (row, question)
        for row, question in zip(table.to_pylist(), asked, strict=True)
        if row["finish_reason"] == "call"
    ]
    keys = [(row["question_id"], row["sample"]) for row, _ in waiting]
    dialogues = [
        Dialogue(question, [text for own, text in parts_of(row) if own], before.get(key, []))
        for key, (row, question) in zip(keys, waiting, strict=True)
    ]
    started = time.perf_counter()
    answers = environment_of(config).answer(dialogues) if dialogues else []
    seconds = time.perf_counter() - started
    _warn_of_failures(answers)
    for key, dialogue, answer in zip(keys, dialogues, answers, strict=True):
        named = {"question_id": key[0], "sample": key[1], "turn": len(dialogue.turns) - 1}
        rows.append(named | dataclasses.asdict(answer))
    _record(rows, table.num_rows, seconds + (earlier.metrics.get("time/tools", 0.0) if earlier else 0.0))
    return ToolCalls.write(rows)


def _warn_of_failures(answers: Sequence[Answer]) -> None:
    """Warn where each of many calls failed: more likely the environment's fault than the policy's."""
    if len(answers) >= _MANY and all(answer.status in ("error", "timeout", "memory") for answer in answers):
        first = answers[0]
        warnings.warn(
            f"answer_calls: each of {len(answers)} calls failed. The first, of {first.tool}: {first.status}, "
            f"{first.observation.strip():.200}",
            stacklevel=2,
        )


def environment_of(config: EnvironmentConfig) -> Environment:
    """Return what answers.

    Raises:
        ConfigError: programs are to run in a sandbox, and this system allows none; a function that is not there.
    """
    match config:
        case CalculatorConfig():
            return Calculator(config)
        case PythonConfig():
            from stages.environment.python_tool import PythonTool

            return PythonTool(config)
        case FunctionConfig():
            return Function(config)
        case ToolCallsConfig():
            from stages.environment.tool_calls import NamedTools

            return NamedTools(config, environment_of)
        case VerifiersConfig():
            return Verifiers(config)
        case OpenEnvConfig():
            return OpenEnv(config)
        case _:
            assert_never(config)


def parts_of(row: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Return the texts of a row of `Rollouts` in order, each with whether the policy wrote it: its turns, and the answers."""
    ends = [0, *row["text_ends"]]
    last, at, parts = len(row["text_ends"]), 0, list[tuple[bool, str]]()
    for start, end in turns_of(row):
        if start > at:
            parts.append((False, row["text"][ends[at] : ends[start]]))
        parts.append((True, row["text"][ends[start] : ends[end]]))
        at = end
    return [*parts, (False, row["text"][ends[at] :])] if at < last else parts


def _record(rows: list[dict[str, Any]], outputs: int, seconds: float) -> None:
    counts, calling = Counter(row["status"] for row in rows), {(row["question_id"], row["sample"]) for row in rows}
    shares = {f"tool/{status}_rate": counts[status] / len(rows) if rows else None for status in get_args(Status)}
    used = {"tool/calls_mean": len(rows) / outputs, "tool/used_rate": len(calling) / outputs}
    record_metrics({"tool/calls": len(rows), **used, **shares, "time/tools": seconds})
