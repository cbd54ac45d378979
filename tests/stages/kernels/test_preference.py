"""DPO by hand on two pairs of unequal lengths; losses of pairs and of single scores against values by hand and their slopes."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.preference import bradley_terry, dpo, log_ratio_of_outputs, pointwise

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.float64)
LOGP = torch.tensor([[-1.0, -1.0, 0], [-2.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)
REF = torch.tensor([[-1.5, -2.5, 0], [-1.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.claim("DPO summed over tokens")
def test_log_ratios_are_means_over_the_tokens_of_an_output() -> None:
    ratio = LOGP - REF  # row 0: 0.5, 1.5; row 1: -1
    assert log_ratio_of_outputs(ratio, MASK, length_normalised=True).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert log_ratio_of_outputs(ratio, MASK, length_normalised=False).tolist() == [2.0, -1.0, 0.0, 0.0]


@pytest.mark.claim("Eq. 12")
def test_the_value_is_log_sigma_of_the_margin_at_every_token_of_both() -> None:
    found = dpo(LOGP, REF, MASK, beta=0.5, length_normalised=True)
    first = math.log(sigma(0.5 * (1.0 - -1.0)))
    assert found.value_BT[:2].flatten().tolist() == pytest.approx([first] * 6)
    assert found.value_BT[2:].flatten().tolist() == pytest.approx([math.log(0.5)] * 6)
    assert found.shown["preference_margin"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.shown["preference_accuracy"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.claim("DPO summed over tokens")
def test_the_usual_form_sums_over_tokens() -> None:
    found = dpo(LOGP, REF, MASK, beta=0.5, length_normalised=False)
    assert found.value_BT[0, 0].item() == pytest.approx(math.log(sigma(0.5 * (2.0 - -1.0))))


def test_a_pair_of_equal_scores_costs_log_two_and_a_right_order_less() -> None:
    loss = bradley_terry(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])).tolist()
    assert loss == pytest.approx([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))])


def test_the_slope_of_a_pair_is_the_chance_of_the_wrong_order() -> None:
    preferred, other = torch.tensor([0.5], requires_grad=True), torch.tensor([1.5], requires_grad=True)
    bradley_terry(preferred, other).sum().backward()
    assert (preferred.grad.item(), other.grad.item()) == pytest.approx((-sigma(1.0), sigma(1.0)))


def test_scores_far_apart_neither_overflow_nor_lose_their_slope() -> None:
    preferred = torch.tensor([-200.0], requires_grad=True)
    loss = bradley_terry(preferred, torch.tensor([200.0]))
    loss.sum().backward()
    assert (loss.item(), preferred.grad.item()) == (400.0, -1.0)


def test_a_single_score_costs_the_cross_entropy_with_its_label() -> None:
    score, label = torch.tensor([0.0, 2.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.25])
    expected = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2)]
    assert pointwise(score, label).tolist() == pytest.approx(expected)
    score = torch.tensor([0.7, 0.7], requires_grad=True)
    pointwise(score, torch.tensor([1.0, 0.25])).sum().backward()
    assert score.grad.tolist() == pytest.approx([sigma(0.7) - 1, sigma(0.7) - 0.25])
