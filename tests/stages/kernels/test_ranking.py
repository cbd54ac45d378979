"""Losses of pairs and of single scores against values by hand and their slopes."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.ranking import bradley_terry, pointwise


def test_a_pair_of_equal_scores_costs_log_two_and_a_right_order_less() -> None:
    loss = bradley_terry(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])).tolist()
    assert loss == pytest.approx([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))])


def test_only_the_difference_of_a_pair_counts() -> None:
    preferred, other = torch.tensor([1.5]), torch.tensor([-0.25])
    assert bradley_terry(preferred + 7, other + 7).item() == pytest.approx(bradley_terry(preferred, other).item())


def test_the_slope_of_a_pair_is_the_chance_of_the_wrong_order() -> None:
    preferred, other = torch.tensor([0.5], requires_grad=True), torch.tensor([1.5], requires_grad=True)
    bradley_terry(preferred, other).sum().backward()
    wrong = 1 / (1 + math.exp(-1.0))
    assert preferred.grad is not None
    assert other.grad is not None
    assert (preferred.grad.item(), other.grad.item()) == pytest.approx((-wrong, wrong))


def test_scores_far_apart_neither_overflow_nor_lose_their_slope() -> None:
    preferred = torch.tensor([-200.0], requires_grad=True)
    loss = bradley_terry(preferred, torch.tensor([200.0]))
    loss.sum().backward()
    assert preferred.grad is not None
    assert (loss.item(), preferred.grad.item()) == (400.0, -1.0)


def test_a_single_score_costs_the_cross_entropy_with_its_label() -> None:
    score, label = torch.tensor([0.0, 2.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.25])
    expected = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2)]
    assert pointwise(score, label).tolist() == pytest.approx(expected)


def test_the_slope_of_a_single_score_is_probability_less_label() -> None:
    score = torch.tensor([0.7, 0.7], requires_grad=True)
    pointwise(score, torch.tensor([1.0, 0.25])).sum().backward()
    probability = 1 / (1 + math.exp(-0.7))
    assert score.grad is not None
    assert score.grad.tolist() == pytest.approx([probability - 1, probability - 0.25])
