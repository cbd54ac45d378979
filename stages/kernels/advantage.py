"""Advantages (DeepSeekMath, 4.1): each reward compared with the other outputs of its question, or with a value function.

Shapes: N values in any order, Q groups. `values_N[i]` belongs to group `group_N[i]`, an integer in 0..Q-1. A value is one
output's reward (outcome supervision) or one step's (process supervision). T: the tokens of one output; M: the tokens of all
outputs, one output after another. B outputs, T token positions, right-padded, where a value function is used.

All arithmetic is float64. In float32 the mean of eight rewards of 0.7 misses 0.7 by 6e-8, and a group without any
difference between its outputs would get an advantage of up to 60 from dividing that error by a small eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    # Equality of the extremes, not std == 0: rounding gives equal values another mean and a spread above zero.
    degenerate_Q = (valid_Q < 2) | (low_Q == high_Q)
    # Squares of deviations as parts of the range: squares of rewards of 1e-200 would be 0, and A infinite.
    range_Q = np.where(degenerate_Q, 1.0, high_Q - low_Q)
    square_Q = np.bincount(index, weights=((kept - mean_Q[index]) / range_Q[index]) ** 2, minlength=groups)
    variance_Q = np.divide(square_Q, valid_Q - ddof, out=np.zeros(groups), where=~degenerate_Q)
    return GroupStatistics(valid_Q, mean_Q, np.sqrt(variance_Q) * range_Q, degenerate_Q)


def centre(values_N: ArrayLike, group_N: ArrayLike, statistics: GroupStatistics) -> Floats:
    """Every value less the mean of its group: `r_i - mean` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2).

    Exactly 0 in a degenerate group, NaN where r_i is NaN.
    """
    values, group = _checked(values_N, group_N)
    flat = statistics.degenerate_Q[group] & ~np.isnan(values)
    return np.where(flat, 0.0, values - statistics.mean_Q[group])


def normalise(values_N: ArrayLike, group_N: ArrayLike, statistics: GroupStatistics, *, eps: float) -> Floats:
    """Every value against its group: `(r_i - mean) / (std + eps)` (DeepSeekMath, 4.1.2 and 4.1.3).

    Exactly 0 in a degenerate group, NaN where r_i is NaN. `eps` is not in the paper. Degenerate groups do not need it; it
    damps groups whose spread is of its own size.
    """
    if eps < 0:
        raise ValueError(f"eps must be >= 0, found {eps}")
    scale_Q = np.where(statistics.degenerate_Q, 1.0, statistics.std_Q + eps)
    return centre(values_N, group_N, statistics) / scale_Q[np.asarray(group_N, dtype=np.int64)]


def leave_one_out(values_N: ArrayLike, group_N: ArrayLike, statistics: GroupStatistics) -> Floats:
    """Every value less the mean of the *others* of its group, an unbiased baseline (RLOO: Kool et al. 2019; Ahmadian et al.
    2024, arXiv 2402.14740).

        r_i - sum_{j != i} r_j / (n - 1)  =  (r_i - mean) n / (n - 1)

    Exactly 0 in a degenerate group, NaN where r_i is NaN.
    """
    valid_Q = statistics.valid_Q
    factor_Q = np.divide(valid_Q, valid_Q - 1, out=np.ones(len(valid_Q)), where=valid_Q > 1)
    return centre(values_N, group_N, statistics) * factor_Q[np.asarray(group_N, dtype=np.int64)]


def normalise_batch(values_N: ArrayLike) -> Floats:
    """Every value against the whole batch, whatever its group: `(x_i - mean) / std` (REINFORCE++: Hu 2025, arXiv 2501.03262).

    The standard deviation is the population's (ddof 0; over thousands of tokens the difference is in the fourth digit).
    Exactly 0 where all values are equal; NaN values take no part and stay.
    """
    values = np.asarray(values_N, dtype=np.float64)
    if len(values) < 2:
        return np.where(np.isnan(values), np.nan, 0.0)
    batch = np.zeros(len(values), dtype=np.int64)
    return normalise(values, batch, group_statistics(values, batch, ddof=0), eps=0.0)


def to_go(values_T: ArrayLike) -> Floats:
    """What is still to come at each token, its own included: `sum_{s >= t} x_s`, no discount."""
    return np.cumsum(np.asarray(values_T, dtype=np.float64)[::-1])[::-1]


def process_advantages(steps_K: ArrayLike, ends_K: ArrayLike, tokens: int) -> Floats:
    """Process supervision of one output (DeepSeekMath, 4.1.3): its normalised step rewards, summed from each token on.

        A_t = sum_{j : index(j) >= t} r~_j

    The token that ends a step has that step's reward in its sum; tokens behind the last step have none, and get 0. Nothing
    is discounted and nothing averaged, as in the paper: the size of A grows with the number of steps still to come.

    Args:
        steps_K: r~_j of each of the K steps.
        ends_K: index(j), the place of each step's last token, 0 .. tokens - 1.
        tokens: T, the tokens of the output.

    Raises:
        ValueError: an end outside the output.
    """
    ends = np.asarray(ends_K, dtype=np.int64)
    if len(ends) and (ends.min() < 0 or ends.max() >= tokens):
        raise ValueError(f"step ends must lie in 0 .. {tokens - 1}, found {ends.tolist()}")
    placed_T = np.zeros(tokens)
    np.add.at(placed_T, ends, np.asarray(steps_K, dtype=np.float64))
    return to_go(placed_T)


def token_rewards(reward_N: ArrayLike, length_N: ArrayLike, k1_M: ArrayLike | None, *, beta: float) -> Floats:
    """The rewards of all tokens (DeepSeekMath, Eq. 2, with a reward model that judges whole outputs).

        r_t = [t is the last token] r - beta k1_t        k1_t = log pi(o_t | q, o_<t) - log pi_ref(o_t | q, o_<t)

    Args:
        reward_N: reward of each output.
        length_N: its tokens; an output without any has no place for its reward.
        k1_M: the log-ratio of every token, output after output; None where beta is 0.
        beta: KL coefficient.
    """
    reward, length = np.asarray(reward_N, dtype=np.float64), np.asarray(length_N, dtype=np.int64)
    penalty_M = np.zeros(length.sum()) if k1_M is None else -beta * np.asarray(k1_M, dtype=np.float64)
    spoken = length > 0
    penalty_M[(np.cumsum(length) - 1)[spoken]] += reward[spoken]
    return penalty_M


def _checked(values_N: ArrayLike, group_N: ArrayLike) -> tuple[Floats, Integers]:
    """Both arrays in their types, checked for shape; `None` among the values reads as NaN."""
    values = np.asarray(values_N, dtype=np.float64)
    group = np.asarray(group_N, dtype=np.int64)
    if values.ndim != 1 or values.shape != group.shape:
        raise ValueError(f"values and groups must be two vectors of one length, found {values.shape} and {group.shape}")
    if np.isinf(values).any():
        raise ValueError(f"value {int(np.flatnonzero(np.isinf(values))[0])} is infinite; a missing reward is NaN")
    return values, group


@dataclass(frozen=True)
class GAE:
    """Both [B, T], 0 where the mask is."""

    advantage_BT: Floats
    """A-hat_t: how much better the token turned out than V(q, o_<t) promised."""
    return_BT: Floats
    """A-hat_t + V(q, o_<t): what the value function shall predict before the token."""


def gae(reward_BT: ArrayLike, value_BT: ArrayLike, mask_BT: ArrayLike, *, gamma: float, lam: float) -> GAE:
    """Exponentially weighted sum of temporal-difference errors, per token (Schulman et al. 2016, arXiv 1506.02438).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t

    DeepSeekMath, 4.1.1: "A_t is the advantage, computed by applying GAE, based on the rewards {r_>=t} and a learned value
    function". The paper gives neither gamma nor lambda.

    Beyond an output's last token V and A are 0: every output is taken as finished. Where `length` cut it off, the caller's
    reward is all there is for the rest; the value of the unseen state is not bootstrapped.

    A masked position takes no part: `t + 1` is the next position that is not masked, so that what follows a masked stretch
    reaches back across it, undiminished. Zeroing instead would end the episode there. What `reward_BT` and `value_BT` hold
    at masked positions is never read, NaN included.

    Args:
        reward_BT: r_t, the reward received with token t.
        value_BT: V(q, o_<t), the value *before* token t.
        mask_BT: true on the tokens of an output, false on padding and on positions to be skipped.
        gamma: discount of the future, 0 .. 1; 1 does not discount.
        lam: 0 .. 1; 0 is the one-step error delta (biased by V), 1 the reward to go minus V (no bias, most variance).

    Raises:
        ValueError: arrays of different shapes, or `gamma` or `lam` outside 0 .. 1.
    """
    mask = np.asarray(mask_BT, dtype=bool)
    reward, value = (np.asarray(array, dtype=np.float64) for array in (reward_BT, value_BT))
    if mask.ndim != 2 or not mask.shape == reward.shape == value.shape:
        raise ValueError(
            f"rewards, values and mask must be matrices of one shape, found {reward.shape}, {value.shape}, {mask.shape}"
        )
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in 0 .. 1, found gamma = {gamma}, lam = {lam}")
    advantage_BT = np.zeros(mask.shape)
    next_value_B, next_advantage_B = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        delta_B = reward[:, t] + gamma * next_value_B - value[:, t]
        next_advantage_B = np.where(mask[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = np.where(mask[:, t], value[:, t], next_value_B)
        advantage_BT[mask[:, t], t] = next_advantage_B[mask[:, t]]
    return GAE(advantage_BT, np.where(mask, advantage_BT + value, 0.0))
