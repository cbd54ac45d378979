"""Group-relative advantages (DeepSeekMath, section 4.1.2): each reward against the other outputs of its question.

Shapes: N values in any order, Q groups. `values_N[i]` belongs to group `group_N[i]`, an integer in 0..Q-1. A value is one
output's reward (outcome supervision); the same statistics over all step rewards of a group serve process supervision.

All arithmetic is float64. In float32 the mean of eight rewards of 0.7 misses 0.7 by 6e-8, and a group without any
difference between its outputs would get an advantage of up to 60 from dividing that error by a small eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["GroupStatistics", "group_statistics", "normalise", "outcome_advantages"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class GroupStatistics:
    """Mean and spread of each group's valid values; NaN values take no part."""

    valid_Q: Integers
    """Number of values that are not NaN."""
    mean_Q: Floats
    """Mean of the valid values; NaN where there is none."""
    std_Q: Floats
    """Standard deviation of the valid values with divisor `valid - ddof`; 0 where the group is degenerate."""
    degenerate_Q: NDArray[np.bool_]
    """True where all valid values are equal (max == min) or fewer than two are left: nothing to learn from."""


def group_statistics(values_N: ArrayLike, group_N: ArrayLike, *, ddof: int) -> GroupStatistics:
    """Mean and standard deviation of every group.

        mean_q = sum_i r_i / n_q        std_q = sqrt(sum_i (r_i - mean_q)^2 / (n_q - ddof))

    The paper writes `std` and does not say which divisor (DeepSeekMath, 4.1.2), so `ddof` is the caller's to choose.

    Raises:
        ValueError: for a group of one value (its standard deviation does not exist; using the raw reward instead would
            silently be REINFORCE), an infinite value, or a `ddof` other than 0 and 1.
    """
    values, group = _checked(values_N, group_N)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample, Bessel), found {ddof}")
    size_Q = np.bincount(group)
    if (size_Q == 1).any():
        slot = int(np.flatnonzero(size_Q == 1)[0])
        raise ValueError(
            f"group {slot} has one value: an advantage relative to the group needs G >= 2 outputs per question "
            "(with G = 1 the standard deviation does not exist and the rewards would pass unnormalised)"
        )
    groups = len(size_Q)
    valid = ~np.isnan(values)
    kept, index = values[valid], group[valid]
    valid_Q = np.bincount(index, minlength=groups).astype(np.int64)
    total_Q = np.bincount(index, weights=kept, minlength=groups)
    mean_Q = np.divide(total_Q, valid_Q, out=np.full(groups, np.nan), where=valid_Q > 0)
    low_Q, high_Q = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low_Q, index, kept)
    np.maximum.at(high_Q, index, kept)
    # Equality of the extremes, not std == 0: rounding gives equal values a mean beside them and a spread above zero.
    degenerate_Q = (valid_Q < 2) | (low_Q == high_Q)
    square_Q = np.bincount(index, weights=(kept - mean_Q[index]) ** 2, minlength=groups)
    variance_Q = np.divide(square_Q, valid_Q - ddof, out=np.zeros(groups), where=~degenerate_Q)
    return GroupStatistics(valid_Q, mean_Q, np.sqrt(variance_Q), degenerate_Q)


def normalise(values_N: ArrayLike, group_N: ArrayLike, statistics: GroupStatistics, *, eps: float) -> Floats:
    """Every value against its group: `(r_i - mean) / (std + eps)`, exactly 0 in a degenerate group, NaN where r_i is NaN.

    `eps` is not in the paper. Degenerate groups do not need it; it damps groups whose spread is of its own size.
    """
    values, group = _checked(values_N, group_N)
    if eps < 0:
        raise ValueError(f"eps must be >= 0, found {eps}")
    scale_Q = np.where(statistics.degenerate_Q, 1.0, statistics.std_Q + eps)
    normalised = (values - statistics.mean_Q[group]) / scale_Q[group]
    flat = statistics.degenerate_Q[group] & ~np.isnan(values)
    return np.where(flat, 0.0, normalised)


def outcome_advantages(rewards_N: ArrayLike, group_N: ArrayLike, *, ddof: int, eps: float) -> Floats:
    """Outcome supervision (DeepSeekMath, 4.1.2): one advantage per output, the same at each of its tokens.

        A_i = (r_i - mean(r)) / std(r)

    A masked output (reward NaN) keeps its slot, takes no part in the statistics and comes back as NaN.
    """
    return normalise(rewards_N, group_N, group_statistics(rewards_N, group_N, ddof=ddof), eps=eps)


def _checked(values_N: ArrayLike, group_N: ArrayLike) -> tuple[Floats, Integers]:
    """Both arrays in their types, checked for shape; `None` among the values reads as NaN."""
    values = np.asarray(values_N, dtype=np.float64)
    group = np.asarray(group_N, dtype=np.int64)
    if values.ndim != 1 or values.shape != group.shape:
        raise ValueError(f"values and groups must be two vectors of one length, found {values.shape} and {group.shape}")
    if np.isinf(values).any():
        raise ValueError(f"value {int(np.flatnonzero(np.isinf(values))[0])} is infinite; a missing reward is NaN")
    return values, group
