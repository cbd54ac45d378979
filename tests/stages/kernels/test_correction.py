"""Truncated importance weights between rollout engine and trainer, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.correction import sequence_truncated, token_truncated

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


def test_a_normalised_sequence_weight_is_the_geometric_mean_of_its_tokens_weights() -> None:
    found = sequence_truncated(OLD, ROLLOUT, MASK, cap=2.0, normalised=True)
    assert found[0].tolist() == pytest.approx([math.sqrt(3.0 * 1.0)] * 3)
    assert sequence_truncated(OLD, ROLLOUT, MASK, cap=1.5, normalised=True)[0].tolist() == pytest.approx([1.5] * 3)
    nothing = torch.zeros_like(MASK)
    assert sequence_truncated(OLD, ROLLOUT, nothing, cap=2.0, normalised=True)[0].tolist() == [1.0] * 3


def test_the_weight_is_constant_with_respect_to_the_policy() -> None:
    old = OLD.clone().requires_grad_()
    assert not token_truncated(old, ROLLOUT, cap=2.0).requires_grad
    assert not sequence_truncated(old, ROLLOUT, MASK, cap=2.0).requires_grad
