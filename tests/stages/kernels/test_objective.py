"""Surrogates against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.objective import clipped, clipped_weight, sequence_clipped, weighted_likelihood


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def gradient(value: torch.Tensor, logp: torch.Tensor) -> list[float]:
    value.sum().backward()
    return logp.grad.flatten().tolist()


@pytest.mark.claim("Eq. 1")
def test_a_ratio_of_1_4_is_clipped_to_1_2_where_the_advantage_is_positive() -> None:
    found = clipped(row(math.log(1.4)), row(0.0), row(0.94), eps_low=0.2, eps_high=0.2)
    assert found.value_BT.item() == pytest.approx(1.2 * 0.94)
    assert found.clipped_BT.item()


@pytest.mark.claim("the clip's sign", "Eq. 1")
def test_a_ratio_of_1_4_is_not_clipped_where_the_advantage_is_negative() -> None:
    found = clipped(row(math.log(1.4)), row(0.0), row(-0.94), eps_low=0.2, eps_high=0.2)
    assert found.value_BT.item() == pytest.approx(1.4 * -0.94)
    assert not found.clipped_BT.item()


@pytest.mark.claim("the clip's sign")
def test_a_clipped_token_has_no_policy_gradient() -> None:
    logp = row(math.log(1.4), math.log(0.7)).requires_grad_()
    found = clipped(logp, row(0.0, 0.0), row(1.0, -1.0), eps_low=0.2, eps_high=0.2)
    assert gradient(found.value_BT, logp) == [0.0, 0.0]


@pytest.mark.claim("DAPO: clip-higher, token mean")
def test_a_higher_upper_range_lets_unlikely_tokens_grow() -> None:
    found = clipped(row(math.log(1.25)), row(0.0), row(1.0), eps_low=0.2, eps_high=0.28)
    assert found.value_BT.item() == pytest.approx(1.25)
    assert not found.clipped_BT.item()


def test_the_ratio_is_exactly_one_against_its_own_value() -> None:
    logp = torch.tensor([[-8.1, -20.3, -0.1]])
    found = clipped(logp, logp.clone(), torch.ones(1, 3), eps_low=0.2, eps_high=0.2)
    assert found.ratio_BT.tolist() == [[1.0, 1.0, 1.0]]


def test_the_gradient_of_a_weighted_likelihood_is_its_weight() -> None:
    logp = row(-1.0, -2.0, -3.0).requires_grad_()
    assert gradient(weighted_likelihood(logp, row(1.0, 0.0, -0.5)).value_BT, logp) == [1.0, 0.0, -0.5]


@pytest.mark.claim("GSPO and GSPO-token")
def test_a_sequence_ratio_is_the_geometric_mean_over_the_output_alone() -> None:
    # Ratios 2 and 1/2 and padding: s = exp((log 2 + log 1/2) / 2) = 1; ratios 2, 2: s = 2.
    logp, old, mask = row(math.log(2), math.log(0.5), 9.0), row(0.0, 0.0, 0.0), row(1, 1, 0)
    found = sequence_clipped(logp, old, row(1.0, 1.0, 0.0), mask, eps_low=0.1, eps_high=0.1)
    assert found.ratio_BT[0, :2].tolist() == pytest.approx([1.0, 1.0])
    found = sequence_clipped(
        row(math.log(2), math.log(2), 9.0), old, row(1.0, 1.0, 0.0), mask, eps_low=0.1, eps_high=0.1
    )
    assert found.ratio_BT[0, :2].tolist() == pytest.approx([2.0, 2.0])
    assert found.value_BT[0, :2].tolist() == pytest.approx([1.1, 1.1])


def test_a_sequence_ratio_leaves_every_token_its_own_advantage() -> None:
    """GSPO-token: with s = 1 the gradient at each token is its own advantage, not the mean of the output's."""
    logp = row(-1.0, -2.0, 0.0).requires_grad_()
    found = sequence_clipped(logp, row(-1.0, -2.0, 0.0), row(3.0, -1.0, 0.0), row(1, 1, 0), eps_low=0.1, eps_high=0.1)
    assert gradient(found.value_BT, logp) == pytest.approx([3.0, -1.0, 0.0])


@pytest.mark.claim("CISPO")
def test_a_clipped_weight_bounds_the_coefficient_and_keeps_the_gradient() -> None:
    logp = row(math.log(4.0), math.log(0.5)).requires_grad_()
    found = clipped_weight(logp, row(0.0, 0.0), row(1.0, -1.0), eps_high=1.0)
    assert gradient(found.value_BT, logp) == pytest.approx([2.0, -0.5])  # min(4, 2) * 1; 0.5 * -1
    assert found.clipped_BT.tolist() == [[True, False]]
    for ratio in (0.9, 0.01, 1e-6):  # no lower bound
        logp = row(math.log(ratio)).requires_grad_()
        assert gradient(clipped_weight(logp, row(0.0), row(-1.0), eps_high=0.2).value_BT, logp) == pytest.approx(
            [-ratio]
        )
