"""The tables of an exploration in chunks of whole questions, so that memory is bounded however many outputs there are.

What is held of all rows are their keys and lengths (some 30 bytes each); all else is read, from files that are mapped, a chunk
at a time. A question is never cut, so that what compares its outputs finds them all, and no value depends on the chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stages.keys import same_keys
from stages.tables import Logprobs, Rewards, Rollouts, Values

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CHUNK_TOKENS", "Exploration", "read_exploration"]

CHUNK_TOKENS: Final = 2**21
"""Output tokens of a chunk, up to those of one question more: 16 MiB for each array of a float64 a token."""
_ROW: Final = 16
"""What a row counts beside its tokens."""
_KEY: Final = ("question_id", "sample")


@dataclass(frozen=True)
class Exploration:
    """Outputs, and what other stages say of them, as far as there is any."""

    outputs: pa.Table
    rewards: pa.Table | None
    values: pa.Table | None
    logprobs: pa.Table | None

    def chunks(self, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Exploration]:
        """The same, some whole questions at a time, in their order.

        All at once where a question's outputs lie apart or are of another number than the next one's, and where tables are not
        in the same order: those are joined by key.
        """
        cuts = self._cuts(chunk_tokens)
        for start, stop in itertools.pairwise(cuts):
            if len(cuts) == 2:
                yield self
            else:
                parts = (None if table is None else table.slice(start, stop - start) for table in self._tables)
                yield Exploration(*parts)

    @property
    def _tables(self) -> tuple[pa.Table | None, ...]:
        return (self.outputs, self.rewards, self.values, self.logprobs)

    def _cuts(self, chunk_tokens: int) -> list[int]:
        """The rows at which chunks begin, and the number of rows."""
        import numpy as np
        import pyarrow.compute as pc

        rows = self.outputs.num_rows
        cost = np.cumsum(pc.list_value_length(self.outputs["output_ids"]).to_numpy().astype(np.int64) + _ROW)
        if rows < 2 or cost[-1] <= chunk_tokens:
            return [0, rows]
        ids = self.outputs["question_id"].combine_chunks()
        stops = np.append(np.flatnonzero(pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)) + 1, rows)
        even = len(set(np.diff(stops, prepend=0).tolist())) == 1
        together = pc.count_distinct(ids).as_py() == len(stops)
        joined = all(same_keys(self.outputs, table) for table in self._tables if table is not None)
        if not (even and together and joined):
            return [0, rows]
        full = np.diff((cost[stops - 1] - 1) // chunk_tokens) > 0
        return [0, *stops[:-1][full].tolist(), rows]


def read_exploration(
    outputs: Rollouts, rewards: Rewards | None, values: Values | None, logprobs: Logprobs | None
) -> Exploration:
    """The columns that advantages are made of."""
    scores = ("reward", "status", "step_rewards", "step_ends", "scorer")
    return Exploration(
        outputs.read([*_KEY, "output_ids", "finish_reason"]),
        None if rewards is None else rewards.read([*_KEY, *scores]),
        None if values is None else values.read([*_KEY, "value"]),
        None if logprobs is None else logprobs.read([*_KEY, "policy", "reference"]),
    )
