"""Choose the rows that a step learns from, and cut them into micro-batches under a token budget.

Epochs are a function of (seed, step) alone, mini-batches of the questions and a seed. Padding is on the right and lengths are
explicit: a mask is never guessed from `ids != pad`, since pad and EOS may be one token. Shapes: B rows, T padded tokens, O
longest output, N = all output tokens of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from stages.join import KEY, Ragged, key_at
from stages.tables import DataError, Rollouts

if TYPE_CHECKING:
    from torch import Tensor


class _OfQuestion(Protocol):
    @property
    def question_id(self) -> str: ...


T = TypeVar("T", bound=_OfQuestion)


def deal(examples: Sequence[T], *, mini_batches: int, seed: int) -> list[list[T]]:
    """Deal examples to mini-batches by question, so that groups stay whole; one mini-batch keeps their order.

    Where there are fewer questions than mini-batches the last ones are empty: steps that have nothing to learn from.
    """
    if mini_batches == 1 or not examples:
        return [list(examples)] * mini_batches
    questions = list(dict.fromkeys(example.question_id for example in examples))
    random.Random(seed).shuffle(questions)
    place = {question: number % mini_batches for number, question in enumerate(questions)}
    hands: list[list[T]] = [[] for _ in range(mini_batches)]
    for example in examples:
        hands[place[example.question_id]].append(example)
    return hands


def sample_positions(count: int, *, size: int, step: int, seed: int) -> list[int]:
    """Return the row numbers of the batch of `step` among `count` rows.

    Raises:
        DataError: `size` is above `count` or below 1, or `step` is negative.
    """
    if not 1 <= size <= count:
        raise DataError(f"a batch without replacement: expected size in 1..{count} (the set's rows), found {size}")
    if step < 0:
        raise DataError(f"expected step >= 0, found {step}")
    epoch, start = divmod(step * size, count)
    batch = epoch_order(count, size, epoch, seed)[start : start + size]
    if len(batch) < size:
        batch += epoch_order(count, size, epoch + 1, seed)[: size - len(batch)]
    return list(batch)


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, size: int, epoch: int, seed: int) -> tuple[int, ...]:
    """The order in which `epoch` draws the rows 0..count-1: a permutation.

    A batch may begin in one epoch and end in the next. The rows that the next epoch contributes to it are then its first ones
    that the batch does not hold yet; the others follow in their order, so that the epoch stays a permutation.
    """
    order: tuple[int, ...] = ()
    # Each border depends on the order before it, back to a border that no batch crosses.
    first = epoch - epoch % (size // math.gcd(count, size))
    for number in range(first, epoch + 1):
        uniform = random.Random(f"batches/{seed}/{number}").random
        previous, shuffled = order, sorted(range(count), key=lambda _row: uniform())
        begun = number * count % size  # rows of the batch at the border that lie in the previous epoch
        if begun:
            held = set(previous[-begun:])
            head = [row for row in shuffled if row not in held][: size - begun]
            taken = set(head)
            shuffled = head + [row for row in shuffled if row not in taken]
        order = tuple(shuffled)
    return order


class Row(NamedTuple):
    """Hold one sequence: what the policy was given and what it is trained to say."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


def rows_of(outputs: Rollouts) -> tuple[pa.Table, list[Row]]:
    """Return the keys of the outputs, and their ids, in their order."""
    table = outputs.read([*KEY, "prompt_ids", "output_ids"])
    ids = zip(Ragged.of(table["prompt_ids"]), Ragged.of(table["output_ids"]), strict=True)
    return table.select(list(KEY)), [Row(prompt.tolist(), output.tolist()) for prompt, output in ids]


def with_scores(keys: pa.Table, unsound: str, **columns: Sequence[Sequence[float]]) -> pa.Table:
    """Append columns of one number per token.

    Args:
        unsound: what an error says of a number that is not finite; `{name}` in it is the column's.

    Raises:
        ValueError: a number is not finite; names the row.
    """
    table = keys
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        found = Ragged.of(table[name])
        bad = found.row_of_value[~np.isfinite(found.values)]
        if len(bad):
            raise ValueError(f"output {key_at(keys, bad[0])}: {unsound.format(name=name)}")
    return table


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch; `rows` says which of the given rows it holds, in its own order."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 on tokens, 0 on padding (int64, as models expect it)."""
    position_ids_BT: Tensor
    target_mask_BT: Tensor
    """True on output tokens: the ones that are predicted."""
    output_mask_BO: Tensor
    """True where row b has an output token o: the layout of everything computed per output token."""
    target_index_N: Tensor
    """Positions of the output tokens in the flattened [B*T], row after row; the logits before each predict it."""
    targets_N: Tensor
    """The output tokens themselves, in the order of `target_index_N`."""
    rows: tuple[int, ...]

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        if device == "cpu":
            return self
        names = [field.name for field in dataclasses.fields(self) if field.name != "rows"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **moved)


def micro_batches(rows: Sequence[Row], max_tokens: int, *, together: int = 1) -> Iterator[Batch]:
    """Cut `rows` into micro-batches of at most `max_tokens` tokens, padding included, longest rows first.

    Rows of like length share a batch, so that little is padded; what does not fit into memory fails at once. A unit longer
    than the budget makes a batch of its own. Equal lengths keep their order.

    Args:
        together: rows k * together .. (k + 1) * together - 1 form a unit, placed by its longest row, that no cut divides (2 for
            preference pairs).

    Raises:
        ValueError: a row without prompt or without output, by its index; rows that do not divide into units.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
    if together < 1 or len(rows) % together:
        raise ValueError(f"together: expected a positive divisor of {len(rows)} (the rows), found {together}")
    units = [range(start, start + together) for start in range(0, len(rows), together)]
    lengths = [max(len(rows[index].prompt_ids) + len(rows[index].output_ids) for index in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda unit: -lengths[unit])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, together * lengths[order[start]]))
        yield collate(rows, [index for unit in order[start : start + size] for index in units[unit]])
        start += size


def own_share(batches: Sequence[Batch], *, rank: int, world_size: int) -> list[tuple[Batch, float]]:
    """Return every `world_size`-th micro-batch, as (batch, factor of its loss): what one rank computes of a batch.

    All ranks get equally many, since they take part in equally many backward passes: one that would be short forwards a batch
    of another rank with factor 0.
    """
    own = [(batch, 1.0) for batch in batches[rank::world_size]]
    if len(own) < -(-len(batches) // world_size):
        own.append((batches[-1], 0.0))
    return own


def collate(rows: Sequence[Row], indices: Sequence[int]) -> Batch:
    """Return one batch of the rows named by `indices`, padded to the longest of them."""
    import torch

    prompts = np.array([len(rows[index].prompt_ids) for index in indices])
    outputs = np.array([len(rows[index].output_ids) for index in indices])
    for index, prompt, output in zip(indices, prompts, outputs, strict=True):
        if not prompt or not output:
            raise ValueError(f"row {index} has {prompt} prompt and {output} output tokens; both need at least one")
    ends = prompts + outputs
    columns = np.arange(ends.max())
    used_BT = columns < ends[:, None]
    target_BT = used_BT & (columns >= prompts[:, None])
    ids_BT = np.zeros(used_BT.shape, dtype=np.int64)  # any token may pad: it is masked
    # A boolean mask is filled in row-major order: row after row, left to right.
    ids_BT[used_BT] = np.concatenate([part for index in indices for part in rows[index]])
    (target_index_N,) = np.nonzero(target_BT.reshape(-1))
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(used_BT.astype(np.int64)),
        position_ids_BT=torch.from_numpy(np.broadcast_to(columns, ids_BT.shape).copy()),
        target_mask_BT=torch.from_numpy(target_BT),
        output_mask_BO=torch.from_numpy(np.arange(outputs.max()) < outputs[:, None]),
        target_index_N=torch.from_numpy(target_index_N),
        targets_N=torch.from_numpy(ids_BT.reshape(-1)[target_index_N]),
        rows=tuple(indices),
    )


def spread(values_N: Tensor, mask_BO: Tensor) -> Tensor:
    """Return values of output tokens, row after row, in the layout [B, O] of their mask; 0 on padding."""
    return values_N.new_zeros(mask_BO.shape).masked_scatter(mask_BO, values_N)
