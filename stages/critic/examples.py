"""From tables to what the critic learns from: outputs joined with their returns by key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.tables import Advantages, Rollouts

__all__ = ["Example", "join"]


@dataclass(frozen=True)
class Example:
    """An output with what the critic shall predict before each of its tokens."""

    question_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    returns: tuple[float, ...]
    """One value per output id."""
    weight: float = 1.0
    """How many equal outputs this one stands for."""


def join(outputs: Rollouts, advantages: Advantages) -> list[Example]:
    """One example per distinct output that has advantages, weighted by its count; masked rows (null) take no part.

    Raises:
        ValueError: an output without a row of advantages or without returns, returns of another number than tokens or not
            finite.
    """
    by_key = {(row["question_id"], row["sample"]): row for row in advantages.rows()}
    weights: dict[Example, float] = {}
    for row in outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist():
        key = (row["question_id"], row["sample"])
        if key not in by_key:
            raise ValueError(f"output {key} has no advantages; were they estimated from other rollouts?")
        if by_key[key]["advantage"] is None:
            continue
        returns = _checked(key, by_key[key]["returns"], len(row["output_ids"]))
        example = Example(row["question_id"], tuple(row["prompt_ids"]), tuple(row["output_ids"]), returns)
        weights[example] = weights.get(example, 0.0) + 1.0
    return [dataclasses.replace(example, weight=weight) for example, weight in weights.items()]


def _checked(key: tuple[str, int], returns: Sequence[Any] | None, tokens: int) -> tuple[float, ...]:
    if returns is None:
        raise ValueError(
            f"output {key} has no returns to fit a critic to; estimate advantages with advantage.kind = gae"
        )
    if len(returns) != tokens:
        raise ValueError(f"output {key}: expected {tokens} returns, one for each token, found {len(returns)}")
    for token, value in enumerate(returns):
        if value is None or not math.isfinite(value):
            raise ValueError(f"output {key}: the return before token {token} is {value}; expected a finite number")
    return tuple(returns)
