"""Numbers per output token under a fixed model: each distinct row computed once, in micro-batches, and handed back by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.orchestration.interruption import check
from stages.training.batching import Batch, Row, micro_batches, own_share
from stages.training.engine import Engine

__all__ = ["score_rows"]


@torch.no_grad()
def score_rows(
    rows: Sequence[Row], max_tokens: int, score: Callable[[Batch], Tensor], engine: Engine | None = None
) -> list[list[float]]:
    """The values of `score` for each row, one per output token, in the order of `rows`.

    Of several ranks, which call it together, each computes a share of the micro-batches, and all get all values.

    Args:
        rows: equal ones (a sampled group holds many) are computed once.
        max_tokens: padded tokens of a micro-batch.
        score: values of a micro-batch in the layout [B, O] of its output mask.
        engine: whose ranks share the work; None: those of this process's group, where it is in one.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault((tuple(row.prompt_ids), tuple(row.output_ids)), []).append(index)
    distinct = [Row(*ids) for ids in places]
    place = _place() if engine is None else (engine.rank, engine.world_size)
    scored = _score_distinct(distinct, max_tokens, score, *place)
    found: list[list[float]] = [[] for _ in rows]
    for row, equal, values in zip(distinct, places.values(), scored, strict=True):
        for index in equal:
            found[index] = values[: len(row.output_ids)]
    return found


def _score_distinct(
    rows: Sequence[Row], max_tokens: int, score: Callable[[Batch], Tensor], rank: int, world_size: int
) -> list[list[float]]:
    """Values by row, padded to the longest output."""
    if not rows:
        return []
    longest = max(len(row.output_ids) for row in rows)
    table: Tensor | None = None
    for batch, factor in own_share(list(micro_batches(rows, max_tokens)), rank=rank, world_size=world_size):
        check()
        values_BO = score(batch)
        table = values_BO.new_zeros(len(rows), longest) if table is None else table
        if factor:
            table[list(batch.rows), : values_BO.shape[1]] = values_BO
    assert table is not None
    if world_size > 1:
        torch.distributed.all_reduce(table)  # of each row one rank's values and the others' zeros: nothing is rounded
    listed: list[list[float]] = table.tolist()
    return listed


def _place() -> tuple[int, int]:
    """This process's rank and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
