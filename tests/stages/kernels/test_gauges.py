"""AUC, pair accuracy, calibration and correlation against counts by hand and plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stages.kernels.gauges import auc, auc_interval, calibration_error, pair_accuracy, pearson, spearman


def auc_by_counting(score: list[float], right: list[bool]) -> float:
    good = [value for value, yes in zip(score, right, strict=True) if yes]
    bad = [value for value, yes in zip(score, right, strict=True) if not yes]
    return sum(1.0 if s > t else 0.5 if s == t else 0.0 for s in good for t in bad) / (len(good) * len(bad))


def test_auc_is_that_of_counting_all_pairs_and_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    # 0.9 is above all three wrong ones; 0.4 above one, equal to one, below one.
    by_hand = auc([0.9, 0.4, 0.4, 0.1, 0.7], [True, True, False, False, False])
    assert by_hand == pytest.approx((3 + 1.5) / 6)
    rng = random.Random(0)
    for _ in range(50):
        score = [rng.randrange(6) / 5 for _ in range(20)]
        right = [rng.random() < 0.4 for _ in range(18)] + [True, False]
        assert auc(score, right) == pytest.approx(auc_by_counting(score, right), rel=1e-12)
        assert auc(score, right) == pytest.approx(roc_auc_score(right, score), rel=1e-12)


@pytest.mark.parametrize("right", [[True, True], [False, False], []])
def test_auc_of_one_kind_only_is_undefined(right: list[bool]) -> None:
    assert auc([0.1, 0.2][: len(right)], right) is None
    assert auc_interval([0.1, 0.2][: len(right)], right, [0, 1][: len(right)], resamples=100, seed=0) is None


def test_the_interval_resamples_questions_not_rows() -> None:
    rng = random.Random(1)
    questions = [number for number in range(60) for _ in range(8)]
    # All outputs of a question share score and verdict: there are 60 independent rows, not 480.
    level = [rng.gauss(0, 1) for _ in range(60)]
    good = [value + rng.gauss(0, 1) > 0 for value in level]
    score, right = [level[q] for q in questions], [good[q] for q in questions]
    one_each = auc_interval(level, good, list(range(60)), resamples=2000, seed=0)
    clustered = auc_interval(score, right, questions, resamples=2000, seed=0)
    rows = auc_interval(score, right, list(range(480)), resamples=2000, seed=0)
    assert clustered.estimate == pytest.approx(auc(level, good))
    assert (clustered.low, clustered.high) == pytest.approx((one_each.low, one_each.high), abs=1e-9)
    assert rows.high - rows.low < 0.5 * (clustered.high - clustered.low)


def test_the_interval_is_that_of_resampling_by_a_plain_loop() -> None:
    rng = random.Random(2)
    questions = [number for number in range(12) for _ in range(3)]
    score = [rng.random() for _ in questions]
    right = [rng.random() < value for value in score]
    found = auc_interval(score, right, questions, resamples=300, seed=4)
    draws, values = np.random.default_rng(4), []
    for _ in range(300):
        picked = [3 * q + s for q in draws.integers(0, 12, 12) for s in range(3)]
        values.append(auc_by_counting([score[i] for i in picked], [right[i] for i in picked]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_pair_accuracy_compares_within_questions_only() -> None:
    # Question a: one pair, in order. Question b: all wrong ones score higher than a's right one, and it has no pair.
    assert pair_accuracy([0.2, 0.1, 0.9, 0.8], [True, False, False, False], ["a", "a", "b", "b"]) == 1.0
    assert pair_accuracy([0.2, 0.2, 0.9, 0.8], [True, False, True, False], ["a", "a", "b", "b"]) == 0.75
    assert pair_accuracy([0.2, 0.9], [True, False], ["a", "b"]) is None


def test_the_calibration_error_is_the_mean_gap_of_bins() -> None:
    # Bin (0.2, 0.4]: mean 0.3, half right, 2 rows; bin (0.8, 1]: mean 0.9, all right, 2 rows.
    error = calibration_error([0.25, 0.35, 0.85, 0.95], [True, False, True, True], bins=5)
    assert error == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    assert calibration_error([0.0, 1.0], [False, True], bins=10) == 0.0
    assert calibration_error([], [], bins=10) is None
    with pytest.raises(ValueError, match=r"-0\.1 to 2\.0"):
        calibration_error([-0.1, 2.0], [False, True], bins=10)
    with pytest.raises(ValueError, match="finite"):
        auc([0.1, float("nan")], [True, False])


def test_correlations_of_lines_and_monotone_curves() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert pearson(x, [2 * v - 7 for v in x]) == pytest.approx(1.0)
    assert pearson(x, [-v for v in x]) == pytest.approx(-1.0)
    assert spearman(x, [v**5 for v in x]) == pytest.approx(1.0)
    assert pearson(x, [v**5 for v in x]) == pytest.approx(np.corrcoef(x, [v**5 for v in x])[0, 1])
    # Equal values share their mean rank: 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    ranked = np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    assert spearman([0.0, 5.0, 5.0, 9.0], [1, 2, 3, 4]) == pytest.approx(ranked)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])
def test_the_correlation_with_a_constant_is_undefined(constant: float) -> None:
    assert pearson([constant] * 3, [1, 2, 3]) is None
    assert spearman([1, 2, 3], [constant] * 3) is None
    assert pearson([], []) is None
