"""Which rows of a set a step draws, without replacement, and which of a step's rows each optimizer step learns from.

Epochs are a function of (seed, step) alone, mini-batches of the questions and a seed.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from stages.identity import DataError

__all__ = ["deal", "epoch_order", "sample_positions"]


class _OfQuestion(Protocol):
    @property
    def question_id(self) -> str: ...


T = TypeVar("T", bound=_OfQuestion)


def deal(examples: Sequence[T], *, mini_batches: int, seed: int) -> list[list[T]]:
    """Examples dealt to mini-batches by question, so that groups stay whole; one mini-batch keeps their order.

    Where masked rows leave fewer questions than mini-batches the last ones are empty: steps that have nothing to learn from.
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
    """Row numbers of the batch of `step` among `count` rows.

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
