"""Outputs as rows to score, and the check of what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.tables import Rollouts

if TYPE_CHECKING:
    from stages.training.batching import Row

__all__ = ["refuse_nonfinite", "rows_of"]


def rows_of(outputs: Rollouts) -> tuple[list[dict[str, Any]], list[Row]]:
    """The keys of the outputs, and their ids, in their order."""
    from stages.training.batching import Row

    table = outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist()
    keys = [{"question_id": row["question_id"], "sample": row["sample"]} for row in table]
    return keys, [Row(row["prompt_ids"], row["output_ids"]) for row in table]


def refuse_nonfinite(scored: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Raise for the first log-probability in the columns `names` that is not finite.

    Raises:
        ValueError: names row and policy.
    """
    for row in scored:
        for name in names:
            if not all(map(math.isfinite, row[name])):
                key = (row["question_id"], row["sample"])
                raise ValueError(
                    f"output {key}: a log-probability under the {name} is not finite; does the {name} have NaN weights, or "
                    "was a token sampled that it cannot say?"
                )
