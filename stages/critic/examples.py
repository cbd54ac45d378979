"""From tables to what the critic learns from: outputs joined with their returns by key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.tables import Advantages, Rollouts

__all__ = ["Example", "join"]


@dataclass(frozen=True)
class Example:
    """An output with what the critic shall predict before each of its tokens."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    returns: Sequence[float]
    """One value per output id."""


def join(outputs: Rollouts, advantages: Advantages) -> list[Example]:
    """One example per output that has advantages; rows masked out (null advantage) take no part.

    Raises:
        ValueError: an output without a row of advantages or without returns, returns of another number than tokens or not
            finite, or no output left.
    """
    by_key = {(row["question_id"], row["sample"]): row for row in advantages.rows()}
    examples = []
    for row in outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist():
        key = (row["question_id"], row["sample"])
        if key not in by_key:
            raise ValueError(f"output {key} has no advantages; were they estimated from other rollouts?")
        if by_key[key]["advantage"] is None:
            continue
        returns = _checked(key, by_key[key]["returns"], len(row["output_ids"]))
        examples.append(Example(row["prompt_ids"], row["output_ids"], returns))
    if not examples:
        raise ValueError("every output is masked out; there is nothing for the critic to learn from")
    return examples


def _checked(key: tuple[str, int], returns: Sequence[Any] | None, tokens: int) -> Sequence[float]:
    if returns is None:
        raise ValueError(
            f"output {key} has no returns to fit a critic to; estimate advantages with advantage.kind = gae"
        )
    if len(returns) != tokens:
        raise ValueError(f"output {key}: expected {tokens} returns, one for each token, found {len(returns)}")
    for token, value in enumerate(returns):
        if value is None or not math.isfinite(value):
            raise ValueError(f"output {key}: the return before token {token} is {value}; expected a finite number")
    return returns
