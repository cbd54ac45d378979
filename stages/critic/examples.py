"""From tables to what the critic learns from: outputs joined with their returns by key."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from stages.join import KEY, Ragged, align, key_at, per_token
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
    table = outputs.read([*KEY, "prompt_ids", "output_ids"])
    found = align(table, advantages.read([*KEY, "advantage", "returns"]), "advantages")
    kept = found["advantage"].is_valid()
    table, found = table.filter(kept), found.filter(kept)
    absent = np.flatnonzero(found["returns"].is_null())
    if len(absent):
        key = key_at(found, absent[0])
        raise ValueError(
            f"output {key} has no returns to fit a critic to; estimate advantages with advantage.kind = gae"
        )
    output = Ragged.of(table["output_ids"])
    columns = (Ragged.of(table["prompt_ids"]), output, per_token(found, "returns", output.lengths, "returns"))
    rows = zip(*([tuple(values.tolist()) for values in column] for column in columns), strict=True)
    examples = (Example(name, *row) for name, row in zip(table["question_id"].to_pylist(), rows, strict=True))
    return [dataclasses.replace(example, weight=float(count)) for example, count in Counter(examples).items()]
