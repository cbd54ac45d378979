"""Hold the KV cache of `hf.py`: rows that samples share, preallocated, and eager attention that reads shared keys once.

All outputs of a question start in one row, its prefill. When the outputs of a row choose different tokens, the row forks; when
its last output ends, the row is free. Rows stay packed in 0..n-1, so a model never computes for a finished output, and never
computes one prefix twice. Each fork and each freed row costs at most one copy of a row's keys and values.

transformers' DynamicCache copies everything it has at every token; its StaticCache attends to its whole length from the first
token on. Here a token is written in place, and attention reads whole rows of a cache that is at most an eighth wider than what
is filled: the product of a part of a row's columns would copy them first. The mask takes the rest out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

GROUPED = "cohort_grouped"
"""Name of `grouped_attention` among the implementations of transformers."""
Integers = NDArray[np.int64]
_SPARE = 16
"""Columns beyond what is filled, at least, where more are needed; an eighth of what is filled, where that is more."""


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Hold one layer's keys and values, `[rows, heads, room, head size]`, filled up to a column shared by all rows.

    The next forward concerns rows `row ...` and columns `column ...`, with room for `room`; `RowCache.place` sets all three.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.row = self.column = self.room = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _allocate(key_states, self.rows, self.room)
        self.values = _allocate(value_states, self.rows, self.room)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns; return the rows concerned, whole but for a prefill, which reads what it wrote."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end_row, end = self.row + key_states.shape[0], self.column + key_states.shape[2]
        if self.room > self.keys.shape[2]:
            self.keys = _with_room(self.keys, self.room, filled_rows=end_row, filled=self.column)
            self.values = _with_room(self.values, self.room, filled_rows=end_row, filled=self.column)
        self.keys[self.row : end_row, :, self.column : end] = key_states
        self.values[self.row : end_row, :, self.column : end] = value_states
        seen = self.room if self.column else end
        return self.keys[self.row : end_row, :, :seen], self.values[self.row : end_row, :, :seen]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, filled: int) -> None:
        """Copy columns below `filled` of rows `source` to rows `target`; the two are disjoint."""
        for states in (self.keys, self.values):
            states[target, :, :filled] = states[source, :, :filled]

    def spread(self, source: torch.Tensor, filled: int) -> None:
        """Let row i have columns below `filled` of row `source[i]`."""
        for name in ("keys", "values"):
            states = getattr(self, name)
            wider = _allocate(states, self.rows, self.room)
            wider[: len(source), :, :filled] = states[source, :, :filled]
            setattr(self, name, wider)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.column + query_length, 0

    def get_seq_length(self) -> int:
        return self.column

    def get_max_length(self) -> int:
        return self.columns


class RowCache(Cache):  # type: ignore[misc]
    """Hold the layers of one decoding; rows fork and move through `copy_rows`."""

    def __init__(self, layers: int, *, rows: int, columns: int) -> None:
        self.row_layers = [RowLayer(rows, columns) for _ in range(layers)]
        self.columns = columns
        self.room = 0
        super().__init__(layers=list(self.row_layers))

    def place(self, *, row: int, columns: slice) -> int:
        """Say where the next forward writes, from this row on; return how many columns it will read.

        A prefill, which begins at column 0, reads what it writes; a later token reads all the room, filled or not.
        """
        self._make_room(columns.stop)
        for layer in self.row_layers:
            layer.row, layer.column, layer.room = row, columns.start, self.room
        return self.room if columns.start else int(columns.stop)

    def _make_room(self, columns: int) -> None:
        if columns > self.room:
            self.room = min(self.columns, columns + max(_SPARE, columns // 8))

    def spread(self, source: torch.Tensor, filled: int, columns: int) -> None:
        """Let row i have columns below `filled` of row `source[i]`, with room for so many columns."""
        self._make_room(columns)
        for layer in self.row_layers:
            layer.room = self.room
            layer.spread(source, filled)

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, filled: int) -> None:
        for layer in self.row_layers:
            layer.copy_rows(source, target, filled)


def _allocate(like: torch.Tensor, rows: int, room: int) -> torch.Tensor:
    # Zeros: what a mask takes out is multiplied by 0 all the same, and 0 times NaN is NaN.
    return like.new_zeros((rows, like.shape[1], room, like.shape[3]))


def _with_room(states: torch.Tensor, room: int, *, filled_rows: int, filled: int) -> torch.Tensor:
    wider = _allocate(states, states.shape[0], room)
    wider[:filled_rows, :, :filled] = states[:filled_rows, :, :filled]
    return wider


@dataclass(frozen=True)
class Regrouping:
    """Name rows after one token, and the copies that make them."""

    sample_row: Integers
    """[n] new row of each live sample."""
    row_token: Integers
    """[rows] token that each new row reads next."""
    source: Integers
    """Old rows to copy from; never among `target`."""
    target: Integers
    """Rows to copy to; every other new row is already in its place."""


def regroup(sample_row: Integers, token: Integers) -> Regrouping:
    """Return rows for live samples that were in `sample_row` and drew `token`.

    Samples of one row that drew the same token stay together. A row's first child stays where it is, unless packing moves it; a
    target has no child that stays and hence no child at all, so no copy reads what another wrote.
    """
    width = int(token.max()) + 1
    children, child_of_sample = np.unique(sample_row * width + token, return_inverse=True)
    parent = children // width
    first = np.ones(len(parent), dtype=bool)
    first[1:] = parent[1:] != parent[:-1]
    stays = first & (parent < len(parent))
    taken = np.zeros(len(parent), dtype=bool)
    taken[parent[stays]] = True
    target = np.flatnonzero(~taken)
    row = np.where(stays, parent, 0)
    row[~stays] = target
    row_token = np.empty_like(children)
    row_token[row] = children % width
    return Regrouping(row[child_of_sample], row_token, parent[~stays], target)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(q k^T * scaling + mask) v, softmax in float32, the query heads that share keys in one product.

    transformers' eager attention copies keys and values for each query head of a group, at every token; the sums are the
    same. On a CPU, 8 query heads on 2 key heads decode 1.4 times as fast after 20 prompt tokens, 2.6 times after 100.

    query `[rows, heads, T, d]`, key `[rows, key heads, L, d]`, value `[rows, key heads, L, e]`, additive mask
    `[rows, 1, T, L]`; the result is `[rows, T, heads, e]`.

    Raises:
        NotImplementedError: a model whose attention has more to it (soft caps, sinks).
    """
    if softcap is not None or s_aux is not None:
        found = "a soft cap" if softcap is not None else "attention sinks"
        raise NotImplementedError(f"grouped attention knows no {found}; set rollout.backend.attention to eager")
    rows, heads, length, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size)
    scores = torch.matmul(grouped, key.transpose(2, 3)) * (size**-0.5 if scaling is None else scaling)
    scores = scores.view(rows, heads, length, -1) + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype).view(rows, key.shape[1], -1, key.shape[2])
    attended = torch.matmul(weights, value).view(rows, heads, length, -1)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
