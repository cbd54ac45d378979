"""Numbers per output token under a fixed model: each distinct row computed once, in micro-batches, and handed back by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.training.batching import Batch, Row, micro_batches

__all__ = ["score_rows"]


@torch.no_grad()
def score_rows(rows: Sequence[Row], max_tokens: int, score: Callable[[Batch], Tensor]) -> list[list[float]]:
    """The values of `score` for each row, one per output token, in the order of `rows`.

    Args:
        rows: equal ones (a sampled group holds many) are computed once.
        max_tokens: padded tokens of a micro-batch.
        score: values of a micro-batch in the layout [B, O] of its output mask.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault((tuple(row.prompt_ids), tuple(row.output_ids)), []).append(place)
    distinct = [Row(*ids) for ids in places]
    owners = list(places.values())
    found: list[list[float]] = [[] for _ in rows]
    for batch in micro_batches(distinct, max_tokens):
        lengths = batch.output_mask_BO.sum(-1).tolist()
        for index, values, length in zip(batch.rows, score(batch).tolist(), lengths, strict=True):
            for place in owners[index]:
                found[place] = values[:length]
    return found
