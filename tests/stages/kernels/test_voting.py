"""Pass@K and Maj@K against published values and against enumeration of all subsets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from stages.kernels.voting import bootstrap_interval, maj_at_k, pass_at_k


@pytest.mark.parametrize(
    ("k", "expected"), [(1, 0.046875), (4, 0.178667), (8, 0.334677), (16, 0.584869), (32, 0.880952), (64, 1.0)]
)
def test_pass_at_k_of_3_right_among_64_has_the_published_values(k: int, expected: float) -> None:
    assert pass_at_k(64, 3, k) == pytest.approx(expected, abs=5e-7)


def test_pass_at_k_is_zero_without_a_right_sample_and_one_where_wrong_samples_run_out() -> None:
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 4, 7) == 1.0


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_outside_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.n"):
        pass_at_k(4, 1, k)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.n"):
        maj_at_k(4, 1, [1], k)


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
    ],
)
def test_maj_at_k_equals_the_mean_over_all_subsets(n: int, correct: int, wrong: list[int]) -> None:
    for k in range(1, n + 1):
        assert maj_at_k(n, correct, wrong, k) == pytest.approx(by_enumeration(n, correct, wrong, k), abs=1e-12), k


def test_maj_at_1_is_plain_accuracy() -> None:
    assert maj_at_k(64, 20, [30, 5], 1) == pytest.approx(20 / 64)


def test_a_tie_is_shared_evenly() -> None:
    assert maj_at_k(4, 2, [2], 4) == 0.5
    assert maj_at_k(6, 2, [2, 2], 6) == pytest.approx(1 / 3)


def test_samples_without_an_answer_do_not_vote() -> None:
    assert maj_at_k(10, 1, [], 10) == 1.0
    assert maj_at_k(10, 0, [], 10) == 0.0


def test_a_consistent_majority_wins_more_often_with_more_votes() -> None:
    curve = [maj_at_k(64, 30, [20, 10, 4], k) for k in (1, 4, 16, 64)]
    assert curve == sorted(curve)
    assert curve[-1] == 1.0


def test_maj_at_k_never_exceeds_pass_at_k() -> None:
    for k in (1, 2, 8, 32):
        assert maj_at_k(32, 5, [4, 3, 1], k) <= pass_at_k(32, 5, k) + 1e-12


def test_counts_that_exceed_the_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        maj_at_k(4, 3, [2], 2)


def test_the_interval_repeats_by_seed_and_holds_the_mean() -> None:
    values = [0.0, 1.0] * 50
    first = bootstrap_interval(values, resamples=500, seed=3)
    assert first == bootstrap_interval(values, resamples=500, seed=3)
    assert first.estimate == 0.5
    # Normal approximation: 0.5 -+ 1.96 * 0.5 / sqrt(100) = 0.402 .. 0.598
    assert first.low == pytest.approx(0.402, abs=0.02)
    assert first.high == pytest.approx(0.598, abs=0.02)


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = bootstrap_interval([1.0] * 10, resamples=100, seed=0)
    assert (found.low, found.estimate, found.high) == (1.0, 1.0, 1.0)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([], resamples=100, seed=0)
