"""Pass@K and Maj@K against published values and all subsets; measures of scores against definitions and scikit-learn."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from stages.kernels.estimators import (
    auc,
    auc_interval,
    bootstrap_interval,
    calibration_error,
    maj_at_k,
    pair_accuracy,
    pass_at_k,
    pearson,
    share_interval,
    spearman,
    wilson_interval,
)


@pytest.mark.claim("Pass@K of the first K", "5.2.2, Fig. 7")
@pytest.mark.parametrize(
    ("k", "expected"), [(1, 0.046875), (4, 0.178667), (8, 0.334677), (16, 0.584869), (32, 0.880952), (64, 1.0)]
)
def test_pass_at_k_of_3_right_among_64_has_the_published_values(k: int, expected: float) -> None:
    assert pass_at_k(64, 3, k) == pytest.approx(expected, abs=5e-7)
    assert (pass_at_k(10, 0, 10), pass_at_k(10, 4, 7)) == (0.0, 1.0)  # none is right; wrong samples run out


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pass_at_k(4, 1, 0), "k=0, n=4"),
        (lambda: maj_at_k(4, 1, [1], 5), "k=5, n=4"),
        (lambda: maj_at_k(4, 3, [2], 2), "do not fit"),
        (lambda: bootstrap_interval([], resamples=100, seed=0), "non-empty"),
        *((lambda s=s, n=n: wilson_interval(s, n), f"found {s} of {n}") for s, n in ((-0.1, 5), (1.1, 5), (0.5, 0))),
        *(
            (lambda v=v: share_interval(v, resamples=100, seed=0), f"found {min(v)} to {max(v)}")
            for v in ([0.5, 1.5], [-0.1, 0.5], [2.0, 2.0])
        ),
    ],
)
def test_counts_and_shares_that_cannot_be_are_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def by_enumeration(n: int, correct: int, wrong: list[int], k: int) -> float:
    votes = ["right"] * correct + [f"wrong {i}" for i, count in enumerate(wrong) for _ in range(count)]
    votes += [""] * (n - len(votes))
    total = subsets = 0.0
    for subset in itertools.combinations(votes, k):
        counts = Counter(vote for vote in subset if vote)
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        total += ("right" in best) / max(len(best), 1)
        subsets += 1
    return total / subsets


@pytest.mark.claim("Pass@K of the first K", "5.2.2, Fig. 7")
@pytest.mark.parametrize(
    ("n", "correct", "wrong"),
    [
        (6, 2, [2, 2]),
        (7, 3, [3]),
        (8, 2, [1, 1, 1, 1]),
        (9, 3, [2, 2, 1]),
        (9, 4, [4]),
        (8, 1, [5]),
        (8, 3, []),
        (9, 2, [1, 2, 3]),
        (10, 0, []),
        (10, 1, []),
    ],
)
def test_maj_at_k_equals_the_mean_over_all_subsets(n: int, correct: int, wrong: list[int]) -> None:
    assert maj_at_k(n, correct, wrong, 1) == pytest.approx(correct / n if correct else 0.0)
    for k in range(1, n + 1):
        assert maj_at_k(n, correct, wrong, k) == pytest.approx(by_enumeration(n, correct, wrong, k), abs=1e-12), k


def test_each_tail_leaves_out_half_of_what_is_not_confidence() -> None:
    """Of 10,000 resampled means 50 lie below a 99 % interval and 50 above it, 1,000 outside an 80 % one on each side."""
    values = [1.0] * 3 + [0.0] * 97
    rng = np.random.default_rng(7)
    means = np.sort([np.mean([values[i] for i in rng.integers(0, 100, 100)]) for _ in range(10_000)])
    for confidence, tail in ((0.99, 50), (0.8, 1000), (0.95, 250)):
        found = bootstrap_interval(values, resamples=10_000, seed=7, confidence=confidence)
        assert (found.low, found.high) == pytest.approx((means[tail], means[-tail - 1]), abs=1e-12)
    # A few right questions of many: the interval is not symmetric, so that exchanged or shared tails are seen.
    assert found.high - found.estimate > 1.2 * (found.estimate - found.low)


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_is_another_resampling(seed: int) -> None:
    values = np.linspace(0, 1, 17) ** 2
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, 17, 17)].mean() for _ in range(200)]
    found = bootstrap_interval(values, resamples=200, seed=seed)
    assert (found.low, found.high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))
    narrow = share_interval(values, resamples=200, seed=seed, confidence=0.9)
    assert narrow == bootstrap_interval(values, resamples=200, seed=seed, confidence=0.9)
    assert found.estimate == pytest.approx(values.mean())
    constant = bootstrap_interval([1.0] * 10, resamples=100, seed=seed)
    assert (constant.low, constant.estimate, constant.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, Table I), method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_has_the_published_values(right: int, n: int, low: float, high: float) -> None:
    found = wilson_interval(right / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    turned = wilson_interval(1 - right / n, n)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_bound_at_the_edge_is_the_edge_itself(share: float) -> None:
    for n in (1, 3, 7, 1000, 10**6):
        found = wilson_interval(share, n)
        assert share in (found.low, found.high)
        assert 0.0 <= found.low < found.high <= 1.0


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_equal_shares_have_the_interval_of_that_many_trials(share: float) -> None:
    assert share_interval([share] * 12, resamples=100, seed=0) == wilson_interval(share, 12)


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
