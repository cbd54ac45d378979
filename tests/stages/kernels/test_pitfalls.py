"""Numbers behind the mistakes that docs/correctness.md lists: what each would cost, and that the kernels do not make it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.kernels.advantage import group_statistics, normalise
from stages.kernels.logprobs import token_logprobs
from stages.kernels.objective import clipped
from tests.stages.update.coefficients import grpo


@pytest.mark.claim("sampled at T, scored at 1")
def test_sampling_at_0_7_and_scoring_at_1_is_a_ratio_of_1_325() -> None:
    logits, token = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    scored, sampled = (token_logprobs(logits, token, temperature=t) for t in (1.0, 0.7))
    assert (scored - sampled).exp().item() == pytest.approx(1.325, abs=5e-4)


@pytest.mark.claim("log-probabilities in bfloat16")
@pytest.mark.parametrize(("logp", "ratio"), [(-8.1, 1.0253), (-2.3, 0.9969), (-20.3, 0.951)])
def test_a_logprob_kept_in_bfloat16_is_a_ratio_other_than_one(logp: float, ratio: float) -> None:
    kept = torch.tensor(logp, dtype=torch.float64).bfloat16().double().item()
    assert math.exp(logp - kept) == pytest.approx(ratio, abs=5e-4)


@pytest.mark.claim("log-probabilities in bfloat16")
@pytest.mark.parametrize("spread", [2.3, 8.1, 20.3])
def test_logprobs_of_bfloat16_logits_lose_nothing_more(spread: float) -> None:
    logits = torch.tensor([[spread, 0.0, -1.0]], dtype=torch.bfloat16)
    exact = torch.log_softmax(logits.double(), -1)[0, 1].item()
    found = token_logprobs(logits, torch.tensor([1])).item()
    assert math.exp(found - exact) == pytest.approx(1.0, abs=2e-6)


@pytest.mark.claim("an estimator with another gradient")
def test_the_gradient_coefficient_of_grpo_at_a_log_ratio_of_one_half() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert grpo(1.5 * one, -1.2 * one, -0.7 * one, beta=0.04).item() == pytest.approx(1.5259489, abs=5e-8)


@pytest.mark.claim("equal rewards with advantages of 60")
def test_in_float32_equal_rewards_would_have_an_advantage_of_60() -> None:
    """Why statistics are float64 and equality is decided by max == min: the mean of eight rewards of 0.7 is not 0.7."""
    rewards = torch.full((1, 8), 0.7)
    usual = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
    assert usual.abs().max() > 0.5  # 59.6 where the row's deviation is exactly 0, 0.9 where it is 6e-8
    for size, reward in ((8, 0.7), (8, 0.1), (16, 0.1), (16, -5.3)):
        values, group = [reward] * size, [0] * size
        assert not normalise(values, group, group_statistics(values, group, ddof=1), eps=0.0).any()


@pytest.mark.claim("hidden shaping")
def test_nothing_bounds_rewards_or_advantages() -> None:
    """A lone winner of 64: mean 1/64, deviation 1/8, advantage 7.875, which clipping or whitening would lower."""
    rewards, group = [1000.0] + [0.0] * 63, [0] * 64
    found = normalise(rewards, group, group_statistics(rewards, group, ddof=1), eps=0.0)
    assert found[0] == pytest.approx(7.875)
    assert found[1:] == pytest.approx(np.full(63, -0.125))


@pytest.mark.claim("hidden shaping")
def test_a_negative_advantage_has_no_second_bound() -> None:
    """Dual clipping would stop at 3 times the advantage; min[ r A, clip(r) A ] does not."""
    logp = torch.full((1, 1), math.log(10.0), dtype=torch.float64, requires_grad=True)
    found = clipped(logp, torch.zeros(1, 1), -torch.ones(1, 1), eps_low=0.2, eps_high=0.2)
    found.value_BT.sum().backward()
    assert found.value_BT.item() == pytest.approx(-10.0)
    assert logp.grad.item() == pytest.approx(-10.0)
