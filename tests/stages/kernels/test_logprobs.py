"""Token log-probabilities: golden values, precision and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels import logprobs
from stages.kernels.logprobs import entropies, token_logprobs


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, -1.4076), (0.7, -1.6887)])
def test_the_temperature_divides_the_logits(temperature: float, expected: float) -> None:
    value = token_logprobs(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1]), temperature=temperature)
    assert value.item() == pytest.approx(expected, abs=1e-4)


def test_bfloat16_logits_give_float32_logprobs() -> None:
    # -8.1 in bfloat16 would be -8.125: log-sum-exp of (0, 8.1) is 8.1003, computed in float32 from the stored 8.125.
    value = token_logprobs(torch.tensor([[0.0, 8.1]], dtype=torch.bfloat16), torch.tensor([0]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(-math.log1p(math.exp(8.125)), abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_its_gradient_is_that_of_log_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator)
    tokens = torch.tensor([0, 3, 10, 3, 7])
    weights = torch.randn(5, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (token_logprobs(ours, tokens, temperature=0.7) * weights).sum().backward()
    (torch.log_softmax(theirs / 0.7, -1)[range(5), tokens] * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=0)


def test_float64_logits_give_float64_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(6, 13, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([0, 12, 3, 3, 7, 1])
    weights = torch.randn(6, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = token_logprobs(ours, tokens, temperature=0.7), torch.log_softmax(theirs / 0.7, -1)
    (value * weights).sum().backward()
    (expected[range(6), tokens] * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(value, expected[range(6), tokens], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert (ours.grad - theirs.grad).norm() < 1e-12 * theirs.grad.norm()
    by_hand = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(entropies(logits, temperature=0.7), by_hand.detach(), rtol=1e-12, atol=1e-13)


def test_entropy_of_a_uniform_and_of_a_certain_distribution() -> None:
    logits = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert entropies(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert entropies(torch.tensor([[0.0, math.log(3)]]), temperature=1.0).item() == pytest.approx(0.5623351, abs=1e-6)
