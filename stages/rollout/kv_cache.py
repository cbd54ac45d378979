"""Keys and values of many rows in preallocated memory, behind transformers' cache interface.

transformers' DynamicCache concatenates (copies everything it has, every token); its StaticCache attends to its whole length
from the first token on. Here a token is written in place and attention sees a view of what is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_FIRST_ROOM = 64
"""Tokens of room given at first; more is made by half when it is used up, so that short outputs cost little memory."""


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values, `[rows, heads, room, head size]`, filled up to a column shared by all rows.

    The next forward concerns rows `row ...` and columns `column ...`, both set by `RowCache.place`.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.row = 0
        self.column = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        room = min(self.columns, key_states.shape[2] + _FIRST_ROOM)
        self.keys = _allocate(key_states, self.rows, room)
        self.values = _allocate(value_states, self.rows, room)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new columns and returns views of all columns of the rows concerned."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end_row, end = self.row + key_states.shape[0], self.column + key_states.shape[2]
        if end > self.keys.shape[2]:
            room = min(self.columns, max(end, self.keys.shape[2] * 3 // 2))
            self.keys = _with_room(self.keys, room, filled_rows=end_row, filled=self.column)
            self.values = _with_room(self.values, room, filled_rows=end_row, filled=self.column)
        self.keys[self.row : end_row, :, self.column : end] = key_states
        self.values[self.row : end_row, :, self.column : end] = value_states
        return self.keys[self.row : end_row, :, :end], self.values[self.row : end_row, :, :end]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, filled: int) -> None:
        """Columns below `filled` of rows `source` become those of rows `target`; the two are disjoint."""
        for states in (self.keys, self.values):
            states[target, :, :filled] = states[source, :, :filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.column + query_length, 0

    def get_seq_length(self) -> int:
        return self.column

    def get_max_length(self) -> int:
        return self.columns


class RowCache(Cache):  # type: ignore[misc]
    """The layers of one decoding; rows fork and move through `copy_rows`."""

    def __init__(self, layers: int, *, rows: int, columns: int) -> None:
        self.row_layers = [RowLayer(rows, columns) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))

    def place(self, *, row: int, column: int) -> None:
        """Where the next forward writes: from this row on, at this column."""
        for layer in self.row_layers:
            layer.row, layer.column = row, column

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, filled: int) -> None:
        for layer in self.row_layers:
            layer.copy_rows(source, target, filled)


def _allocate(like: torch.Tensor, rows: int, room: int) -> torch.Tensor:
    return like.new_empty((rows, like.shape[1], room, like.shape[3]))


def _with_room(states: torch.Tensor, room: int, *, filled_rows: int, filled: int) -> torch.Tensor:
    wider = _allocate(states, states.shape[0], room)
    wider[:filled_rows, :, :filled] = states[:filled_rows, :, :filled]
    return wider
