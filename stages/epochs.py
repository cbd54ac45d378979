"""Which rows of a set a step draws: without replacement, epoch after epoch, as a function of (seed, step) alone."""

from __future__ import annotations

import functools
import math
import random

from stages.identity import DataError

__all__ = ["epoch_order", "sample_positions"]


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
