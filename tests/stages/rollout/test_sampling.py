"""Seeds, uniform numbers and the draw of a token, against published numbers and the softmax."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stages.rollout import hf
from stages.rollout.generator import sample_seed
from stages.rollout.hf import sample, uniforms

LARGE = 151_936


def test_uniforms_are_the_published_splitmix64_stream() -> None:
    # First outputs of SplitMix64 for seed 1234567 (Vigna's reference implementation).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = [uniforms(np.array([1234567], dtype=np.uint64), step)[0] for step in range(3)]
    assert drawn == [(number >> 24) / 2**40 for number in published]


@pytest.mark.claim("one seed for a whole group")
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


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_draws_from_151_936_tokens_follow_the_softmax_to_a_count(temperature: float) -> None:
    """u at (i + 1/2) / n draws a run of neighbouring tokens of probability p between n p - 1 and n p + 1 times."""
    n, draw = 3000, np.random.default_rng(0)
    logits = torch.from_numpy(draw.normal(size=(2, LARGE)) * 2).to(torch.bfloat16)
    logits[:, draw.integers(0, LARGE, 40)] += 6
    logits[1, 1000:90_000] = -math.inf
    row = np.tile([1, 0], n)
    uniform = np.repeat((np.arange(n) + 0.5) / n, 2)
    token, logprob = sample(logits, row, uniform, temperature)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1).numpy()
    np.testing.assert_allclose(logprob, expected[row, token], atol=2e-5)
    for r in (0, 1):
        p = np.exp(expected[r])
        found = np.bincount(token[row == r], minlength=LARGE)
        assert not found[p == 0].any()
        for edges in (np.arange(LARGE), np.arange(0, LARGE, 977), np.array([0, LARGE // 2])):
            wrong = np.add.reduceat(found, edges) - n * np.add.reduceat(p, edges)
            assert np.abs(wrong).max() < 1.01, "0.01: the probabilities are rounded to float32"
        assert np.count_nonzero(found) > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_sampling_a_part_of_the_rows_at_a_time_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, temperature: float, dtype: torch.dtype
) -> None:
    draw = np.random.default_rng(1)
    row, uniform = draw.integers(0, 11, 50), draw.random(50)
    row[row == 4] = 5  # a row without a sample
    for vocabulary in (7, 64, 1000):
        logits = torch.from_numpy(draw.normal(size=(11, vocabulary)) * 4).to(dtype)
        found = []
        for part in (1, 2 * vocabulary + 1, 10 * vocabulary, 2**20):
            monkeypatch.setattr(hf, "_PART", part)
            token, logprob = sample(logits, row, uniform, temperature)
            found.append((token.tolist(), logprob.tobytes()))
        assert found == found[:1] * 4


def test_sampling_sorts_nothing_and_copies_no_whole_logits() -> None:
    class Calls(TorchDispatchMode):
        """Note what is called, and the size of what it makes; views make nothing."""

        made: ClassVar[dict[str, list[int]]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = result if isinstance(result, tuple) else (result,)
            name = func.overloadpacket.__name__
            if not func.is_view:
                self.made.setdefault(name, []).extend(t.numel() for t in made if isinstance(t, torch.Tensor))
            return result

    rows = 20
    logits = torch.randn(rows, LARGE)
    with Calls() as calls:
        sample(logits, np.arange(rows), np.full(rows, 0.5), 0.7)
    assert not {"sort", "topk", "argsort", "multinomial", "_softmax"} & set(calls.made)
    assert sum(calls.made["_log_softmax"]) == sum(calls.made["exp"]) == rows * LARGE, "each logit once"
    assert max(max(sizes, default=0) for sizes in calls.made.values()) == 6 * LARGE, "2**20 // 151,936 rows"


def test_a_token_without_probability_is_never_drawn() -> None:
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


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    token, logprob = sample(torch.tensor([[0.0, 2.0, 2.0]]), np.array([0]), np.array([0.99]), 0.0)
    assert token.tolist() == [1]
    assert logprob[0] == pytest.approx(-math.log(2 + math.exp(-2)), abs=1e-6)


@pytest.mark.claim("NaN of the engine becomes 0")
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 70])
def test_logits_that_are_not_finite_are_refused(wrong: float, place: int) -> None:
    logits = torch.zeros(3, 71)
    sample(logits, np.array([0]), np.array([0.5]), 1.0)
    logits[1, place] = wrong
    with pytest.raises(FloatingPointError):
        sample(logits, np.array([0]), np.array([0.5]), 1.0)


def test_logits_of_no_token_are_refused_and_of_one_are_not() -> None:
    logits = torch.full((2, 70), -math.inf)
    logits[:, 69] = -3.0
    token, logprob = sample(logits, np.array([1, 0]), np.array([0.0, 0.9]), 1.0)
    assert (token.tolist(), logprob.tolist()) == ([69, 69], [0.0, 0.0])
    logits[1, 69] = -math.inf
    with pytest.raises(FloatingPointError):
        sample(logits, np.array([0]), np.array([0.5]), 1.0)
