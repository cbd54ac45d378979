"""Token log-probabilities: golden values, precision and gradient; and how far engine and trainer differ."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels import logprobs
from stages.kernels.logprobs import (
    WeightSums,
    effective_share,
    entropies,
    sequence_truncated,
    token_logprobs,
    token_mismatch,
    token_truncated,
    weight_sums,
)


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


TRAINER_RO = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -3.0, -1.0]])
ENGINE_RO = torch.tensor([[-1.5, -1.0, 9.0], [-0.5, -3.25, -1.0]])
MASK_RO = torch.tensor([[True, True, False], [True, True, True]])


def test_differences_are_summed_over_output_tokens_and_never_over_padding() -> None:
    found = token_mismatch(TRAINER_RO, ENGINE_RO, MASK_RO)
    # d = 0.5, -1 | 0, 0.25, 0; the 9 is on padding.
    assert (found.tokens, found.difference, found.largest) == (5, 1.75, 1.0)
    assert found.log_weight_R.tolist() == [-0.5, 0.25]
    assert found.divergence == pytest.approx(sum(math.exp(d) - d - 1 for d in (0.5, -1.0, 0.25)), rel=1e-12)


def test_over_samples_of_the_engine_it_is_the_divergence_from_trainer() -> None:
    engine, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    each = [
        token_mismatch(t.log()[None, None], e.log()[None, None], torch.ones(1, 1, dtype=torch.bool))
        for e, t in zip(engine, trainer, strict=True)
    ]
    expected = float((engine * (engine / trainer).log()).sum())
    assert sum(float(e) * found.divergence for e, found in zip(engine, each, strict=True)) == pytest.approx(
        expected, rel=1e-6
    )


def test_differences_in_the_last_bits_have_a_divergence_above_zero() -> None:
    trainer = torch.tensor([[-1.0]])
    engine = torch.nextafter(trainer, torch.tensor(0.0))
    found = token_mismatch(trainer, engine, torch.ones(1, 1, dtype=torch.bool))
    assert found.largest == 2.0**-24
    assert found.divergence == pytest.approx(2.0**-49, rel=1e-6)  # d^2 / 2


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([3.0, 1.0], 0.8),  # 4^2 / (2 * 10)
        ([1.0, 1e-200, 1e-200, 1e-200], 0.25),  # a single one decides
        ([0.5], 1.0),
    ],
)
def test_the_effective_share_of_weights_by_hand(weights: list[float], share: float) -> None:
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    sums = weight_sums(log_weights, shift=float(log_weights.max()))
    assert effective_share(sums, len(weights)) == pytest.approx(share, rel=1e-12)


@pytest.mark.claim("importance weights that overflow")
@pytest.mark.parametrize("level", [0.0, 2000.0, -2000.0])
def test_the_effective_share_does_not_depend_on_the_level_of_the_weights(level: float) -> None:
    """Outputs of a thousand tokens that differ by 2 nats each: their weights are beyond any float."""
    log_weights = level + torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    assert effective_share(weight_sums(log_weights, shift=float(log_weights.max())), 2) == pytest.approx(0.8, rel=1e-9)


def test_weight_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    log_weights = torch.tensor([0.3, -2.0, 1.5, 0.0])
    whole = weight_sums(log_weights, shift=1.5)
    parts = [weight_sums(part, shift=1.5) for part in (log_weights[:1], log_weights[1:])]
    added = WeightSums(*(sum(side) for side in zip(*parts, strict=True)))
    assert added == pytest.approx(whole, rel=1e-12)


OLD = torch.tensor([[math.log(0.6), math.log(0.9), 0.0]], dtype=torch.float64)
ROLLOUT = torch.tensor([[math.log(0.2), math.log(0.9), 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0]])


def test_a_token_weight_is_truncated_at_the_cap() -> None:
    assert token_truncated(OLD, ROLLOUT, cap=2.0)[0].tolist() == pytest.approx([2.0, 1.0, 1.0])
    assert token_truncated(OLD, ROLLOUT, cap=5.0)[0].tolist() == pytest.approx([3.0, 1.0, 1.0])
    assert token_truncated(OLD, OLD.clone(), cap=2.0).tolist() == [[1.0, 1.0, 1.0]]


def test_a_sequence_weight_is_the_product_over_the_output_truncated() -> None:
    swapped = sequence_truncated(ROLLOUT, OLD, MASK, cap=2.0)
    assert swapped[0].tolist() == pytest.approx([1 / 3] * 3)
    assert sequence_truncated(OLD, ROLLOUT, MASK, cap=2.0)[0].tolist() == pytest.approx([2.0] * 3)


def test_a_normalised_sequence_weight_is_the_geometric_mean() -> None:
    found = sequence_truncated(OLD, ROLLOUT, MASK, cap=2.0, normalised=True)
    assert found[0].tolist() == pytest.approx([math.sqrt(3.0 * 1.0)] * 3)
    assert sequence_truncated(OLD, ROLLOUT, MASK, cap=1.5, normalised=True)[0].tolist() == pytest.approx([1.5] * 3)
    nothing = torch.zeros_like(MASK)
    assert sequence_truncated(OLD, ROLLOUT, nothing, cap=2.0, normalised=True)[0].tolist() == [1.0] * 3


def test_the_weight_is_constant_with_respect_to_the_policy() -> None:
    old = OLD.clone().requires_grad_()
    assert not token_truncated(old, ROLLOUT, cap=2.0).requires_grad
    assert not sequence_truncated(old, ROLLOUT, MASK, cap=2.0).requires_grad
