"""From the padded values of a micro-batch back to rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from stages.training.batching import Batch

__all__ = ["rows_of"]


def rows_of(batch: Batch, values_BO: Tensor) -> Iterator[tuple[int, list[float]]]:
    """Each row's index among the rows that were batched, and its values, one per output token."""
    lengths = batch.output_mask_BO.sum(-1).tolist()
    for index, values, length in zip(batch.rows, values_BO.tolist(), lengths, strict=True):
        yield index, values[:length]
