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
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.join import KEY, Ragged
from stages.tables import DataError, Rollouts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.training.sharing import Sharing


class _OfQuestion(Protocol):
    @property
    def question_id(self) -> str: ...


T = TypeVar("T", bound=_OfQuestion)
SHARED_KEYS: Final = 0.25
"""What a key that an output attends to counts in the budget of a micro-batch that shares prompts: each output has copies of its
prompt's. With it such a micro-batch takes no more memory than one of separate sequences; measured, ours."""


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
    return list(batch + epoch_order(count, size, epoch + 1, seed)[: size - len(batch)] if len(batch) < size else batch)


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
    written: Sequence[bool] | None = None
    """Whether the policy wrote each output id, or an environment did; None: it wrote all."""


def rows_of(outputs: Rollouts) -> tuple[pa.Table, list[Row]]:
    """Return the keys of the outputs, and their ids, in their order."""
    table = outputs.read([*KEY, "prompt_ids", "output_ids"])
    ids = zip(Ragged.of(table["prompt_ids"]), Ragged.of(table["output_ids"]), strict=True)
    return table.select(list(KEY)), [Row(prompt.tolist(), output.tolist()) for prompt, output in ids]


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch; `rows` says which of the given rows it holds, in its own order.

    Every row is one of the tensors' rows; or all are in one, behind the prompts that they share (`sharing`).
    """

    input_ids_BT: Tensor
    attention_mask: Tensor
    """1 on tokens, 0 on padding (int64, as models expect it). With `sharing`, which attention reads instead: a single 1."""
    position_ids_BT: Tensor
    output_mask_BO: Tensor
    """True where row b has an output token o: the layout of everything computed per output token."""
    source_index_N: Tensor
    """Where the token before each output token is in the flattened [B*T], row after row: its logits predict that one."""
    targets_N: Tensor
    """The output tokens themselves, in the order of `source_index_N`."""
    starts: tuple[int, ...]
    """Where each row's first output token is in the flattened [B*T]."""
    rows: tuple[int, ...]
    sharing: Sharing | None = None
    """Where attention finds the tokens, if rows share prompts."""
    observed_BO: Tensor | None = None
    """True on output tokens that an environment wrote; None where there are none."""

    @property
    def written(self) -> Tensor:
        """True on the output tokens that the policy wrote, [B, O]: what is learned from."""
        return self.output_mask_BO if self.observed_BO is None else self.output_mask_BO & ~self.observed_BO

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding not counted."""
        return int(self.attention_mask.sum()) if self.sharing is None else self.input_ids_BT.numel()

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with."""
        shared = {} if self.sharing is None else {"sharing": self.sharing.for_a_pass()}
        ids, positions = self.input_ids_BT, self.position_ids_BT
        return {"input_ids": ids, "attention_mask": self.attention_mask, "position_ids": positions, **shared}

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        if device == "cpu":
            return self
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=True) for name, part in parts.items() if hasattr(part, "to")
        }
        return dataclasses.replace(self, **moved)


def micro_batches(
    rows: Sequence[Row],
    max_tokens: int,
    *,
    model: torch.nn.Module | None = None,
    units: Sequence[Sequence[int]] | None = None,
) -> Iterator[Batch]:
    """Cut `rows` into micro-batches of at most `max_tokens` tokens, padding included, longest rows first.

    Rows of like length share a batch, so that little is padded; what does not fit into memory fails at once. A unit longer
    than the budget makes a batch of its own. Equal lengths keep their order. Where prompts are shared, rows of one prompt
    follow one another, the prompt with the longest row first. A prompt counts once a batch, and what an output attends to
    as `SHARED_KEYS` of as many tokens.

    Args:
        model: what computes them: it forwards a prompt that several rows have once a batch, if it can. None: never.
        units: indices of rows that no cut divides, of one prompt each (preference pairs). None: every row by itself.

    Raises:
        ValueError: a row without prompt or without output, by its index.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
    shared = model is not None and _sharing_saves(rows, model)
    for indices in _cut(rows, [[row] for row in range(len(rows))] if units is None else units, max_tokens, shared):
        yield collate(rows, indices, shared=shared)


def _sharing_saves(rows: Sequence[Row], model: torch.nn.Module) -> bool:
    """Return whether several rows have one prompt, and the model can forward it once."""
    from stages.training.sharing import longest_shared

    repeated = len({tuple(row.prompt_ids) for row in rows}) < len(rows)
    return repeated and max(map(_length, rows)) <= longest_shared(model)


def _length(row: Row) -> int:
    return len(row.prompt_ids) + len(row.output_ids)


class _Size(NamedTuple):
    """What a micro-batch that is being filled holds."""

    rows: int = 0
    longest: int = 0
    """Of prompts with their outputs, in tokens."""
    output: int = 0
    """The longest output."""
    prompts: int = 0
    """How many distinct ones."""
    prompt: int = 0
    """The longest."""

    def plus(self, held: Sequence[Row], *, new_prompt: bool) -> Self:
        return self._replace(
            rows=self.rows + len(held),
            longest=max(self.longest, *map(_length, held)),
            output=max(self.output, *(len(row.output_ids) for row in held)),
            prompts=self.prompts + new_prompt,
            prompt=max(self.prompt, *(len(row.prompt_ids) for row in held)),
        )

    def tokens(self, *, shared: bool) -> float:
        """Return what it takes of a budget: its tokens, padding included."""
        if not shared:
            return self.rows * self.longest
        keys = SHARED_KEYS * self.rows * self.longest
        return self.prompts * self.prompt + self.rows * self.output + keys


def _cut(rows: Sequence[Row], units: Sequence[Sequence[int]], max_tokens: int, shared: bool) -> Iterator[list[int]]:
    """Yield the indices of the rows of each micro-batch."""
    order = sorted(units, key=lambda unit: -max(_length(rows[index]) for index in unit))
    if shared:
        together: dict[tuple[int, ...], list[Sequence[int]]] = {}
        for unit in order:
            together.setdefault(tuple(rows[unit[0]].prompt_ids), []).append(unit)
        order = [unit for members in together.values() for unit in members]
    held, size, last = list[int](), _Size(), None
    for unit in order:
        members, prompt = [rows[index] for index in unit], rows[unit[0]].prompt_ids
        grown = size.plus(members, new_prompt=prompt != last)
        if held and grown.tokens(shared=shared) > max_tokens:
            yield held
            held, grown = [], _Size().plus(members, new_prompt=True)
        held, size, last = [*held, *unit], grown, prompt
    if held:
        yield held


def own_share(batches: Sequence[Batch], *, rank: int, world_size: int) -> list[tuple[Batch, float]]:
    """Return every `world_size`-th micro-batch, as (batch, factor of its loss): what one rank computes of a batch.

    All ranks get equally many, since they take part in equally many backward passes: one that would be short forwards a batch
    of another rank with factor 0.
    """
    own = [(batch, 1.0) for batch in batches[rank::world_size]]
    if len(own) < -(-len(batches) // world_size):
        own.append((batches[-1], 0.0))
    return own


def collate(rows: Sequence[Row], indices: Sequence[int], *, shared: bool = False) -> Batch:
    """Return one batch of the rows named by `indices`: each padded to the longest, or in one row behind their prompts."""
    import torch

    held = [rows[index] for index in indices]
    for index, (prompt, output, _) in zip(indices, held, strict=True):
        if not len(prompt) or not len(output):
            raise ValueError(
                f"row {index} has {len(prompt)} prompt and {len(output)} output tokens; both need at least one"
            )
    outputs = np.array([len(row.output_ids) for row in held])
    layout = _in_one_row(held, outputs) if shared else _in_rows(held, outputs)
    begins = np.cumsum(outputs) - outputs
    source_N = np.repeat(layout.starts - begins, outputs) + np.arange(outputs.sum()) - 1
    source_N[begins] = layout.ends  # an output's first token follows its prompt, wherever that is
    mask_BO = torch.from_numpy(np.arange(outputs.max()) < outputs[:, None])
    return Batch(
        input_ids_BT=torch.from_numpy(layout.ids_BT),
        attention_mask=torch.from_numpy(layout.mask),
        position_ids_BT=torch.from_numpy(layout.positions_BT),
        output_mask_BO=mask_BO,
        source_index_N=torch.from_numpy(source_N),
        targets_N=torch.from_numpy(np.concatenate([row.output_ids for row in held])),
        starts=tuple(layout.starts.tolist()),
        rows=tuple(indices),
        sharing=layout.sharing,
        observed_BO=_observed(held, mask_BO),
    )


def _observed(held: Sequence[Row], mask_BO: Tensor) -> Tensor | None:
    import torch

    if all(row.written is None for row in held):
        return None
    written = [row.written or (True,) * len(row.output_ids) for row in held]
    return ~spread(torch.from_numpy(np.concatenate(written)), mask_BO) & mask_BO


class _Layout(NamedTuple):
    """Where tokens are; places are in the flattened [B*T]."""

    ids_BT: NDArray[np.int64]
    mask: NDArray[np.int64]
    positions_BT: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Of each row's prompt: its last token."""
    starts: NDArray[np.int64]
    """Of each row's output: its first token."""
    sharing: Sharing | None = None


def _in_rows(held: Sequence[Row], outputs: NDArray[np.int64]) -> _Layout:
    prompts = np.array([len(row.prompt_ids) for row in held])
    columns = np.arange((prompts + outputs).max())
    used_BT = columns < (prompts + outputs)[:, None]
    ids_BT = np.zeros(used_BT.shape, dtype=np.int64)  # any token may pad: it is masked
    # A boolean mask is filled in row-major order: row after row, left to right.
    ids_BT[used_BT] = np.concatenate([ids for row in held for ids in (row.prompt_ids, row.output_ids)])
    positions_BT = np.broadcast_to(columns, ids_BT.shape).copy()
    starts = np.arange(len(held)) * len(columns) + prompts
    return _Layout(ids_BT, used_BT.astype(np.int64), positions_BT, starts - 1, starts)


def _in_one_row(held: Sequence[Row], outputs: NDArray[np.int64]) -> _Layout:
    from stages.training.sharing import Sharing

    numbers: dict[tuple[int, ...], int] = {}
    prompt_B = np.array([numbers.setdefault(tuple(row.prompt_ids), len(numbers)) for row in held])
    prompts = np.array([len(prompt) for prompt in numbers])
    ids = np.concatenate([*numbers, *(row.output_ids for row in held)])
    sizes = np.concatenate([prompts, outputs])
    begins = np.cumsum(sizes) - sizes
    positions = np.arange(len(ids)) - np.repeat(begins, sizes)
    positions[prompts.sum() :] += np.repeat(prompts[prompt_B], outputs)
    starts, ends = begins[len(prompts) :], np.cumsum(prompts) - 1
    one = np.ones((1, 1, 1, 1), dtype=np.int64)  # of four dimensions: transformers hands it through as it is
    return _Layout(ids[None], one, positions[None], ends[prompt_B], starts, Sharing.of(prompts, outputs, prompt_B))


def spread(values_N: Tensor, mask_BO: Tensor) -> Tensor:
    """Return values of output tokens, row after row, in the layout [B, O] of their mask; 0 on padding."""
    return values_N.new_zeros(mask_BO.shape).masked_scatter(mask_BO, values_N)
