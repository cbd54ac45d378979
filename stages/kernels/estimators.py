"""Estimators over samples of questions: Pass@K, Maj@K, intervals, and how well scores tell right from wrong.

Pass@K and Maj@K use all n samples of a question: the expectation over every subset of size k, not the first k (one subset of
many, a noisier number that depends on the order of the rows). Discrimination, calibration and correlation of scores are None
where they are undefined.

Legend: N rows, C distinct scores, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_LARGEST_N = 1000
"""Above it the number of subsets, C(n, n/2), leaves the range of a double."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from n, is correct.

    pass@k = 1 - C(n - c, k) / C(n, k)                     (Chen et al. 2021, the unbiased estimator)
    """
    _check(n, k)
    if not 0 <= correct <= n:
        raise ValueError(f"correct must lie in 0..{n}, found {correct}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(n: int, correct: int, wrong: Sequence[int], k: int) -> float:
    """Probability that the correct answer wins a vote among k samples drawn without replacement from n.

    `correct` is the number of samples with the correct answer, `wrong` the number of samples of each distinct wrong
    answer; the other n - correct - sum(wrong) samples gave no answer. Exact expectation over all C(n, k) subsets.

    Rules: a sample without an answer takes its place in the subset and does not vote; if no sample votes the vote is lost;
    a tie of t answers is won by each with probability 1/t (what "the first one seen wins" is on average, whatever the
    order of the rows).

    Formula: the sum over v votes for the correct answer of C(c, v) * W(v, t, k - v) / (1 + t) / C(n, k), where W counts
    the ways to choose the rest so that no wrong answer has more than v votes and exactly t of them have v.
    """
    _check(n, k)
    if n > _LARGEST_N:
        raise ValueError(f"n must be at most {_LARGEST_N} samples per question, found {n}")
    if correct < 0 or any(count < 1 for count in wrong) or correct + sum(wrong) > n:
        raise ValueError(f"counts of answers do not fit: n={n}, correct={correct}, wrong={list(wrong)}")
    return _maj_at_k(n, correct, tuple(sorted(wrong)), k)


@lru_cache(maxsize=65_536)  # questions share few patterns of counts
def _maj_at_k(n: int, correct: int, wrong: tuple[int, ...], k: int) -> float:
    favourable = 0.0
    for votes in range(1, min(correct, k) + 1):
        rivals = [count for count in wrong if count >= votes]
        ways = _ways_to_lose_or_tie(n - correct, rivals, votes, k - votes)
        shares = 1.0 / np.arange(1, len(ways) + 1)
        favourable += math.comb(correct, votes) * float(shares @ ways)
    # Subsets are counted in doubles: keep their rounding from leaving [0, 1].
    return min(favourable / math.comb(n, k), 1.0)


def _ways_to_lose_or_tie(others: int, rivals: Sequence[int], votes: int, size: int) -> NDArray[np.float64]:
    """Entry t: ways to choose `size` of the `others` so that no rival exceeds `votes` and exactly t rivals reach it.

    `rivals` are the counts of the wrong answers that have at least `votes` samples. All other samples (rarer answers, no
    answer) cannot matter to the vote, so they are one free pool.
    """
    free = others - sum(rivals)
    most_ties = min(len(rivals), size // votes)
    ways = np.zeros((most_ties + 1, size + 1))
    ways[0] = [math.comb(free, chosen) for chosen in range(size + 1)]
    for count in rivals:
        grown = ways.copy()
        for taken in range(1, min(votes, size + 1)):
            grown[:, taken:] += math.comb(count, taken) * ways[:, : size + 1 - taken]
        if votes <= size:
            grown[1:, votes:] += math.comb(count, votes) * ways[:-1, : size + 1 - votes]
        ways = grown
    return ways[:, size]


def bootstrap_interval(values_Q: ArrayLike, *, resamples: int, seed: int, confidence: float = 0.95) -> Interval:
    """Mean of one value per question with the percentile bootstrap interval over questions.

    Of the means of `resamples` draws of Q questions with replacement, the quantiles (1 - confidence) / 2 and 1 less that
    (Efron and Tibshirani 1993, chapter 13). Questions are resampled, not samples: samples of one question are not independent
    of one another. Where all values are equal the interval has no width.

    Raises:
        ValueError: no values, or some that are not finite.
    """
    values = np.asarray(values_Q, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected a non-empty vector of finite values, found shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, values.size, values.size)].mean() for _ in range(resamples)])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def share_interval(values_Q: ArrayLike, *, resamples: int, seed: int, confidence: float = 0.95) -> Interval:
    """Mean of one share per question (accuracy, Pass@K, Maj@K; each in [0, 1]) with its interval over questions.

    `bootstrap_interval`; where every question has the same share p, Wilson's interval of p in Q trials takes its place. The
    bootstrap has no width there, which at p = 0 or 1 would claim certainty from a few questions. Between 0 and 1 Wilson's is
    wider than it need be: a share in [0, 1] with mean p has at most the variance p (1 - p) of a coin.

    Raises:
        ValueError: no values, or a share outside [0, 1].
    """
    found = bootstrap_interval(values_Q, resamples=resamples, seed=seed, confidence=confidence)
    values = np.asarray(values_Q, dtype=np.float64)
    if values.min() < 0.0 or values.max() > 1.0:
        raise ValueError(f"expected shares in [0, 1], found {values.min()} to {values.max()}")
    if values.min() == values.max():
        return wilson_interval(float(values[0]), values.size, confidence=confidence)
    return found


def wilson_interval(share: float, n: int, *, confidence: float = 0.95) -> Interval:
    """The score interval of a share in n independent trials.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z the normal quantile of (1 + confidence) / 2
    (Wilson 1927, Journal of the American Statistical Association 22). At p = 0 from 0 to z^2 / (n + z^2).

    Raises:
        ValueError: a share outside [0, 1], or no trials.
    """
    if n < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"expected a share in [0, 1] of at least one trial, found {share} of {n}")
    z2 = NormalDist().inv_cdf((1.0 + confidence) / 2.0) ** 2
    centre = share + z2 / (2 * n)
    reach = math.sqrt(z2 * (share * (1.0 - share) / n + z2 / (4 * n * n)))
    low, high = (centre - reach) / (1.0 + z2 / n), (centre + reach) / (1.0 + z2 / n)
    # At 0 and 1 a bound is the share itself: keep rounding from moving it past.
    return Interval(share, min(max(low, 0.0), share), max(min(high, 1.0), share))


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n (samples per question), found k={k}, n={n}")


def auc(score_N: ArrayLike, right_N: ArrayLike) -> float | None:
    """Chance that a right row, drawn at random, scores above a wrong one; equal scores count one half. 0.5 is chance.

    AUC = (1 / (R W)) sum_{i right, j wrong} [s_i > s_j] + [s_i = s_j] / 2          (Mann and Whitney's U over R W)

    None where all rows are right or none is.
    """
    score, right = _floats(score_N), np.asarray(right_N, dtype=bool)
    return _weighted_auc(*_ranked(score), right, np.ones(len(score)))


def auc_interval(
    score_N: ArrayLike,
    right_N: ArrayLike,
    question_N: ArrayLike,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval | None:
    """AUC with the percentile bootstrap interval over questions.

    Whole questions are resampled: outputs of one question are not independent. Resamples in which all rows are right or none
    is have no AUC and do not count.

    Args:
        question_N: number of each row's question.
    """
    score, right = _floats(score_N), np.asarray(right_N, dtype=bool)
    _, question = np.unique(np.asarray(question_N), return_inverse=True)
    place, count = _ranked(score)
    estimate = _weighted_auc(place, count, right, np.ones(len(score)))
    if estimate is None:
        return None
    rng, questions = np.random.default_rng(seed), int(question.max()) + 1
    found = []
    for _ in range(resamples):
        times_Q = np.bincount(rng.integers(0, questions, questions), minlength=questions)
        found.append(_weighted_auc(place, count, right, times_Q[question].astype(np.float64)))
    drawn = [value for value in found if value is not None] or [estimate]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high))


def pair_accuracy(score_N: ArrayLike, right_N: ArrayLike, question_N: ArrayLike) -> float | None:
    """Share of all pairs of a right and a wrong row *of one question* that are in order; equal scores count one half.

    What a group's advantages depend on, where `auc` also compares rows of different questions. None without any pair.
    """
    score, right = _floats(score_N), np.asarray(right_N, dtype=bool)
    _, question = np.unique(np.asarray(question_N), return_inverse=True)
    ordered = pairs = 0.0
    for rows in np.split(np.argsort(question, kind="stable"), np.cumsum(np.bincount(question))[:-1]):
        difference = score[rows][right[rows]][:, None] - score[rows][~right[rows]][None, :]
        ordered += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        pairs += difference.size
    return ordered / pairs if pairs else None


def calibration_error(probability_N: ArrayLike, right_N: ArrayLike, *, bins: int) -> float | None:
    """Expected calibration error: sum_b (n_b / N) |mean probability in b - share of right rows in b|.

    Bins are of equal width in [0, 1], open at the left but for the first (Naeini et al. 2015).
    """
    probability, right = _floats(probability_N), _floats(right_N)
    if not len(probability):
        return None
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError(f"expected probabilities, found {probability.min()} to {probability.max()}")
    place = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=probability - right, minlength=bins)
    return float(np.abs(gap).sum() / len(probability))


def pearson(first_N: ArrayLike, second_N: ArrayLike) -> float | None:
    """Linear correlation; None where either is constant."""
    first, second = _floats(first_N), _floats(second_N)
    if not len(first) or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    first, second = first - first.mean(), second - second.mean()
    return float(np.clip(first @ second / np.sqrt((first @ first) * (second @ second)), -1.0, 1.0))


def spearman(first_N: ArrayLike, second_N: ArrayLike) -> float | None:
    """Correlation of the ranks, equal values sharing their mean rank; None where either is constant."""
    return pearson(_ranks(_floats(first_N)), _ranks(_floats(second_N)))


def _ranks(values: Floats) -> Floats:
    if not len(values):
        return values
    place, count = _ranked(values)
    mean_rank: Floats = np.cumsum(count) - (count - 1) / 2
    return mean_rank[place]


def _ranked(values: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the number of its value among the C distinct ones in ascending order; and how many rows have each."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return place, count


def _weighted_auc(
    place_N: NDArray[np.int64], count_C: NDArray[np.int64], right_N: NDArray[np.bool_], weight_N: Floats
) -> float | None:
    right_C = np.bincount(place_N, weights=weight_N * right_N, minlength=len(count_C))
    wrong_C = np.bincount(place_N, weights=weight_N * ~right_N, minlength=len(count_C))
    pairs = right_C.sum() * wrong_C.sum()
    below_C = np.cumsum(wrong_C) - wrong_C
    return float(right_C @ (below_C + wrong_C / 2) / pairs) if pairs else None


def _floats(values: ArrayLike) -> Floats:
    found: Floats = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"expected a vector of finite numbers, found shape {found.shape}")
    return found
