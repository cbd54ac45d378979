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


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_values_entropies_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, exact: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    logits, weights = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((6, 13), (6,)))
    tokens = torch.tensor([0, 12, 3, 3, 7, 1])
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value, table = token_logprobs(ours, tokens, temperature=0.7), torch.log_softmax(theirs / 0.7, -1)
    (value * weights).sum().backward()
    (table[range(6), tokens] * weights).sum().backward()
    found = (value, entropies(logits, temperature=0.7), ours.grad)
    for ours_, expected in zip(
        found, (table[range(6), tokens], -(table.exp() * table).sum(-1), theirs.grad), strict=True
    ):
        assert ours_.dtype == dtype
        torch.testing.assert_close(ours_.double(), expected, rtol=exact, atol=exact)


def test_entropy_of_a_uniform_and_of_a_certain_distribution() -> None:
    logits = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert entropies(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
