"""Seeds, uniform numbers and drawing by inversion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rollout.sampling import sample
from stages.rollout.seeds import sample_seed, uniforms


def test_uniforms_are_the_published_splitmix64_stream() -> None:
    # First outputs of SplitMix64 for seed 1234567 (Vigna's reference implementation).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = [uniforms(np.array([1234567], dtype=np.uint64), step)[0] for step in range(3)]
    assert drawn == [(number >> 24) / 2**40 for number in published]


def test_seeds_of_a_group_differ_and_fit_a_signed_column() -> None:
    seeds = [sample_seed(0, question, sample) for question in ("a", "b", "a1") for sample in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, "a", 0) != sample_seed(0, "a", 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf], [0.0, 0.0, 3.0, 0.0, 1.0]])
    n = 40_000
    seeds = np.array([sample_seed(3, "q", i) for i in range(n)], dtype=np.uint64)
    row = np.repeat([0, 1], n // 2)
    token, _ = sample(logits, row, uniforms(seeds, 0), temperature)
    for r in (0, 1):
        expected = torch.softmax(logits[r].double() / temperature, dim=-1).numpy() * (n // 2)
        found = np.bincount(token[row == r], minlength=5)
        possible = expected > 0
        assert not found[~possible].any()
        chi_square = (((found - expected) ** 2)[possible] / expected[possible]).sum()
        assert chi_square < 20, "p < 0.0005 at 4 degrees of freedom"


@pytest.mark.parametrize("vocabulary", [64, 65, 200])
def test_frequencies_follow_a_distribution_of_several_blocks(vocabulary: int) -> None:
    n = 60_000
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, vocabulary))).float()
    logits[0, 10:40] = -math.inf
    seeds = np.array([sample_seed(4, "q", i) for i in range(n)], dtype=np.uint64)
    token, _ = sample(logits, np.zeros(n, dtype=np.int64), uniforms(seeds, 3), 1.0)
    expected = torch.softmax(logits[0].double(), dim=-1).numpy() * n
    found = np.bincount(token, minlength=vocabulary)
    possible = expected > 0
    assert not found[~possible].any()
    freedom = possible.sum() - 1
    chi_square = (((found - expected) ** 2)[possible] / expected[possible]).sum()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@given(
    st.lists(st.sampled_from([-math.inf, -30.0, 0.0, 1.0, 9.0]), min_size=2, max_size=130), st.integers(0, 2**40 - 1)
)
def test_inversion_agrees_with_plain_summation(logits: list[float], numerator: int) -> None:
    logits[-1] = 0.0  # at least one token is possible
    u = numerator / 2**40
    probability = torch.softmax(torch.tensor(logits), dim=-1)
    token, _ = sample(torch.tensor([logits]), np.array([0]), np.array([u]), 1.0)
    assert probability[token[0]] > 0
    cumulated = np.cumsum(probability.double().numpy())
    before = cumulated[token[0] - 1] if token[0] else 0.0
    assert before - 1e-6 <= u * cumulated[-1] <= cumulated[token[0]] + 1e-6


def test_a_token_without_probability_is_never_drawn_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    token, logprob = sample(logits, np.zeros(4, dtype=np.int64), np.array([0.0, 0.5 - 2**-40, 0.5, 1 - 2**-40]), 1.0)
    assert token.tolist() == [1, 1, 3, 3]
    np.testing.assert_allclose(logprob, math.log(0.5), rtol=1e-6)


def test_logprobs_are_those_at_the_temperature() -> None:
    # Logits 2, 1, 0, the second token: -1.4076 at T = 1, -1.6887 at T = 0.7
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    for temperature, expected in ((1.0, -1.4076), (0.7, -1.6887)):
        token, logprob = sample(logits, np.array([0]), np.array([0.9]), temperature)
        assert token.tolist() == [1]
        assert logprob[0] == pytest.approx(expected, abs=1e-4)


def test_greedy_takes_the_lowest_of_equal_maxima_with_its_logprob_at_temperature_one() -> None:
    token, logprob = sample(torch.tensor([[0.0, 2.0, 2.0]]), np.array([0]), np.array([0.99]), 0.0)
    assert token.tolist() == [1]
    assert logprob[0] == pytest.approx(-math.log(2 + math.exp(-2)), abs=1e-6)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(torch.tensor([[0.0, math.nan]]), np.array([0]), np.array([0.5]), 1.0)
