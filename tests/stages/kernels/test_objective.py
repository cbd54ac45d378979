"""GRPO's objective against values worked out by hand and against the paper's gradient coefficient."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.divergence import k3
from stages.kernels.objective import grpo, sequence_mean_weights


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_a_ratio_of_1_4_is_clipped_to_1_2_where_the_advantage_is_positive() -> None:
    terms = grpo(row(math.log(1.4)), row(0.0), None, row(0.94), eps=0.2, beta=0.0)
    assert terms.objective_BT.item() == pytest.approx(1.2 * 0.94)
    assert terms.clipped_BT.item()


def test_a_ratio_of_1_4_is_not_clipped_where_the_advantage_is_negative() -> None:
    terms = grpo(row(math.log(1.4)), row(0.0), None, row(-0.94), eps=0.2, beta=0.0)
    assert terms.objective_BT.item() == pytest.approx(1.4 * -0.94)
    assert not terms.clipped_BT.item()


def test_a_clipped_token_has_no_policy_gradient() -> None:
    logp = row(math.log(1.4), math.log(0.7)).requires_grad_()
    grpo(logp, row(0.0, 0.0), None, row(1.0, -1.0), eps=0.2, beta=0.0).objective_BT.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[0.0, 0.0]]


def test_the_gradient_is_the_papers_coefficient_of_eq_21() -> None:
    logp = row(-1.2).requires_grad_()
    grpo(logp, logp.detach(), row(-0.7), row(1.5), eps=0.2, beta=0.04).objective_BT.sum().backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(1.5259489, abs=5e-8)  # A + beta (e^0.5 - 1)


def test_k3_is_exactly_zero_and_flat_where_the_policies_agree() -> None:
    logp = torch.tensor([[-0.1, -8.1, -20.3]]).requires_grad_()
    kl = k3(logp, logp.detach().clone())
    kl.sum().backward()
    assert kl.tolist() == [[0.0, 0.0, 0.0]]
    assert logp.grad is not None
    assert logp.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_k3_keeps_its_precision_for_small_divergences() -> None:
    difference = 1e-4  # d^2 / 2 + d^3 / 6; exp(d) - d - 1 in float32 would give 0 or 1.2e-7
    assert k3(torch.tensor([0.0]), torch.tensor([difference])).item() == pytest.approx(5.0002e-9, rel=1e-2)


def test_without_a_reference_the_divergence_is_zero() -> None:
    assert grpo(row(-1.0), row(-1.0), None, row(1.0), eps=0.2, beta=0.0).kl_BT.item() == 0.0


def test_tokens_weigh_one_over_length_and_group_as_in_the_paper() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    weights = sequence_mean_weights(mask, torch.ones(2), outputs=2)
    assert weights[0].tolist() == pytest.approx([1 / 4, 1 / 4, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([1 / 12] * 6)


def test_a_merged_row_weighs_as_much_as_the_rows_it_stands_for() -> None:
    apart = sequence_mean_weights(torch.ones(3, 4), torch.ones(3), outputs=5)
    merged = sequence_mean_weights(torch.ones(1, 4), torch.tensor([3.0]), outputs=5)
    assert merged.sum().item() == pytest.approx(apart.sum().item())
