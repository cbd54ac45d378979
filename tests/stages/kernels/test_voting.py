"""Pass@K and Maj@K against published values and against enumeration of all subsets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from stages.kernels.voting import bootstrap_interval, maj_at_k, pass_at_k, share_interval, wilson_interval


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
