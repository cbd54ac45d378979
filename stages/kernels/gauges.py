"""How well scores tell right outputs from wrong ones: discrimination, calibration, correlation. None where undefined.

Legend: N rows, C distinct scores, Q questions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.kernels.voting import Interval

Floats = NDArray[np.float64]


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
