"""What is refused before any advantage is estimated, naming the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["Key", "check_groups", "check_rewards", "check_same_rows", "check_steps"]

Key = tuple[str, int]


def check_same_rows(wanted: Sequence[Key], found: Sequence[Key], name: str) -> None:
    """Refuses a table whose rows are not exactly those of the outputs."""
    if len(set(found)) < len(found):
        twice = next(key for index, key in enumerate(found) if key in found[:index])
        raise ValueError(f"{name} hold (question_id, sample) {twice} more than once")
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or surplus:
        raise ValueError(
            f"outputs and {name} are not of the same rows: {len(missing)} outputs without a row in {name}, "
            f"{len(surplus)} rows of {name} without an output, for example {min(missing[:1] + surplus[:1])}"
        )


def check_rewards(keys: Sequence[Key], rows: Sequence[dict[str, Any]]) -> None:
    """Refuses a reward that is no number, and rewards of two models in one group."""
    first: dict[str, tuple[Key, str | None]] = {}
    for key, row in zip(keys, rows, strict=True):
        if row["reward"] is not None and not math.isfinite(row["reward"]):
            raise ValueError(
                f"the reward of {key} is {row['reward']}; expected a finite number, or null for a missing one"
            )
        if row["reward"] is None:
            continue
        other, scorer = first.setdefault(key[0], (key, row["scorer"]))
        if scorer != row["scorer"]:
            raise ValueError(
                f"question {key[0]!r}: {other} was scored by {scorer or 'rules'}, {key} by {row['scorer'] or 'rules'}; the "
                "outputs of a question can only be compared by one scorer: score them all anew"
            )


def check_steps(keys: Sequence[Key], rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> None:
    """Refuses step rewards that do not fit the tokens of their output."""
    for key, row, length in zip(keys, rows, lengths, strict=True):
        fault = _step_fault(row["step_rewards"], row["step_ends"], length)
        if fault:
            raise ValueError(f"steps of {key}: {fault}")


def check_groups(keys: Sequence[Key], need: str) -> None:
    """Refuses questions without samples 0 .. G-1 for one G >= 2; `need` says what for.

    A row that is not to count keeps its slot with a null reward; a row that is gone would change its group unseen.
    """
    samples: dict[str, list[int]] = {}
    for question_id, sample in keys:
        samples.setdefault(question_id, []).append(sample)
    first, G = next((question_id, len(found)) for question_id, found in samples.items())
    for question_id, found in samples.items():
        if len(found) == 1:
            raise ValueError(
                f"question {question_id!r} has one output; {need} needs G >= 2 outputs per question (with one there is nothing "
                "to compare it with)"
            )
        gap = sorted(set(range(max(found) + 1)) - set(found))
        if gap:
            raise ValueError(
                f"question {question_id!r}: expected samples 0 .. {max(found)}, {gap[:5]} missing; a row that shall not count "
                "keeps its place with a null reward"
            )
        if len(found) != G:
            raise ValueError(
                f"question {question_id!r} has {len(found)} outputs, question {first!r} has {G}; {need} needs the same G for "
                "every question: rows are missing"
            )


def _step_fault(rewards: list[Any] | None, ends: list[Any] | None, length: int) -> str | None:
    if rewards is None or ends is None:
        only = "step_rewards" if ends is None else "step_ends"
        return (
            None if rewards is ends else f"expected step_rewards and step_ends together or neither, found {only} alone"
        )
    if len(rewards) != len(ends):
        return f"expected one end for each step, found {len(rewards)} step_rewards and {len(ends)} step_ends"
    if not rewards and length:
        return "there are none; an output in which no step is found counts as one step"
    for index, (reward, end) in enumerate(zip(rewards, ends, strict=True)):
        if reward is None or not math.isfinite(reward):
            return f"the reward of step {index} is {reward}; expected a finite number"
        if end is None or not 0 <= end < length:
            return f"step {index} ends at token {end}; the output has the tokens 0 .. {length - 1}"
        if index and end < ends[index - 1]:
            return f"step {index} ends at token {end}, before the step in front of it ({ends[index - 1]})"
    return None
