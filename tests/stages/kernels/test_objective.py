"""Surrogates, KL estimators, weights of tokens, losses of pairs and scores: by hand, and by a bandit with known KL."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from stages.kernels.objective import (
    bradley_terry,
    clipped,
    clipped_weight,
    constant_weights,
    dpo,
    k1,
    k2,
    k3,
    k3_unbiased,
    log_ratio_of_outputs,
    pointwise,
    sequence_clipped,
    sequence_mean_weights,
    token_mean_weights,
    weighted_likelihood,
)


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


Estimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def on_policy(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    return k3_unbiased(logp, ref, logp.detach())


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3, "k3_unbiased": on_policy}

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
"""Three actions of the bandit; the policy starts elsewhere."""
LOGITS = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)


@pytest.mark.claim("an estimator with another gradient", "Eq. 4")
@pytest.mark.parametrize(("name", "gradient"), [("k1", 0.04), ("k2", -0.02), ("k3", -0.0259489)])
def test_gradients_at_log_ratios_of_one_half_are_those_worked_out_by_hand(name: str, gradient: float) -> None:
    logp = torch.tensor([-1.2], dtype=torch.float64).requires_grad_()
    (0.04 * ESTIMATORS[name](logp, torch.tensor([-0.7], dtype=torch.float64))).sum().backward()
    assert logp.grad.item() == pytest.approx(gradient, abs=5e-8)  # k3: -beta (e^0.5 - 1)


@pytest.mark.claim("exp(d) - d - 1 that overflows or rounds")
def test_k3_keeps_its_precision_for_small_divergences() -> None:
    difference = 1e-4  # d^2 / 2 + d^3 / 6; exp(d) - d - 1 in float32 would give 0 or 1.2e-7
    assert k3(torch.tensor([0.0]), torch.tensor([difference])).item() == pytest.approx(5.0002e-9, rel=1e-2)
    logp = torch.tensor([[-0.1, -8.1, -20.3]]).requires_grad_()
    kl = k3(logp, logp.detach().clone())
    kl.sum().backward()
    assert kl.tolist() == logp.grad.tolist() == [[0.0, 0.0, 0.0]]
    # A clamp would take the gradient from the most drifted tokens; an infinite loss is skipped and counted instead.
    assert math.isinf(k3(torch.tensor([-100.0]), torch.tensor([0.0])).item())


@pytest.mark.claim("Eq. 4")
@pytest.mark.parametrize("name", ["k1", "k3", "k3_unbiased"])
def test_the_expected_value_is_the_divergence(name: str) -> None:
    logp = LOGITS.log_softmax(-1)
    expected = (logp.exp() * (logp - REFERENCE.log())).sum()
    found = (logp.exp() * ESTIMATORS[name](logp, REFERENCE.log())).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def expected_gradient(estimator: Estimator) -> torch.Tensor:
    """E over actions sampled from the policy of the gradient of the estimator as a loss, with respect to the logits."""
    total = torch.zeros(3, dtype=torch.float64)
    for action in range(3):
        logits = LOGITS.clone().requires_grad_()
        logp = logits.log_softmax(-1)
        estimator(logp[action], REFERENCE.log()[action]).backward()
        total += logp[action].exp().detach() * logits.grad
    return total


def exact_gradient(divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    divergence(logits.log_softmax(-1)).backward()
    return logits.grad


def reverse(logp: torch.Tensor) -> torch.Tensor:
    """D_KL[pi_theta || pi_ref]."""
    return (logp.exp() * (logp - REFERENCE.log())).sum()


def forward(logp: torch.Tensor) -> torch.Tensor:
    """D_KL[pi_ref || pi_theta]."""
    return (REFERENCE * (REFERENCE.log() - logp)).sum()


def in_the_reward(estimator: Estimator) -> Estimator:
    """The estimator as a constant that weighs log pi: what a penalty in the reward adds to the policy's gradient."""
    return lambda logp, ref: estimator(logp, ref).detach() * logp


@pytest.mark.claim("an estimator with another gradient", "unbiased k3")
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k2, exact_gradient(reverse)),
        (on_policy, exact_gradient(reverse)),
        (k3, exact_gradient(forward)),
        (in_the_reward(k1), exact_gradient(reverse)),
        # Equal to first order near the reference, so that it all but cancels: only k1 is offered in the reward.
        (in_the_reward(k3), exact_gradient(reverse) - exact_gradient(forward)),
    ],
    ids=["k2", "unbiased k3", "k3", "k1 in the reward", "k3 in the reward"],
)
def test_k2_and_unbiased_k3_descend_the_reverse_divergence(estimator: Estimator, expected: torch.Tensor) -> None:
    """And the paper's k3 the forward one; each estimator as a loss, or inside the reward."""
    assert torch.allclose(expected_gradient(estimator), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.claim("an estimator with another gradient")
def test_k1_as_a_loss_does_nothing_on_average() -> None:
    assert torch.allclose(expected_gradient(k1), torch.zeros(3, dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("name", ["k2", "k3", "k3_unbiased"])
def test_descending_brings_the_policy_to_the_reference(name: str) -> None:
    logits = LOGITS.clone()
    before = reverse(logits.log_softmax(-1)).item()
    for _ in range(200):
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)
        # The exact expectation over actions, the policy's own probabilities held fixed as samples are.
        (logp.exp().detach() * ESTIMATORS[name](logp, REFERENCE.log())).sum().backward()
        logits = logits - 0.5 * leaf.grad
    assert reverse(logits.log_softmax(-1)).item() < 1e-6 < before


MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
ONES = torch.ones(2)


@pytest.mark.claim("which mean")
@pytest.mark.parametrize(
    ("weights", "short", "long"),
    [
        (sequence_mean_weights(MASK, ONES, outputs=2), 1 / 4, 1 / 12),
        (token_mean_weights(MASK, ONES, tokens=8), 1 / 8, 1 / 8),
        (constant_weights(MASK, ONES, outputs=2, length=8), 1 / 16, 1 / 16),
    ],
    ids=["sequence mean", "token mean", "constant"],
)
def test_tokens_weigh_one_over_length_and_group_as_in_the_paper(
    weights: torch.Tensor, short: float, long: float
) -> None:
    assert weights[0].tolist() == pytest.approx([short, short, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([long] * 6)
    assert sequence_mean_weights(torch.zeros(1, 3), torch.ones(1), outputs=2).tolist() == [[0.0, 0.0, 0.0]]


def test_a_merged_row_weighs_as_much_as_its_rows() -> None:
    apart = sequence_mean_weights(torch.ones(3, 4), torch.ones(3), outputs=5)
    merged = sequence_mean_weights(torch.ones(1, 4), torch.tensor([3.0]), outputs=5)
    assert merged.sum().item() == pytest.approx(apart.sum().item())


def test_weights_of_two_micro_batches_add_up_to_those_of_the_whole() -> None:
    whole = token_mean_weights(MASK, ONES, tokens=8)
    parts = [token_mean_weights(MASK[i : i + 1], ONES[i : i + 1], tokens=8) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)


PAIRED = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.float64)
LOGP = torch.tensor([[-1.0, -1.0, 0], [-2.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)
REF = torch.tensor([[-1.5, -2.5, 0], [-1.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.claim("DPO summed over tokens")
def test_log_ratios_are_means_over_the_tokens_of_an_output() -> None:
    ratio = LOGP - REF  # row 0: 0.5, 1.5; row 1: -1
    assert log_ratio_of_outputs(ratio, PAIRED, length_normalised=True).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert log_ratio_of_outputs(ratio, PAIRED, length_normalised=False).tolist() == [2.0, -1.0, 0.0, 0.0]


@pytest.mark.claim("Eq. 12")
def test_the_value_is_log_sigma_of_the_margin_at_every_token_of_both() -> None:
    found = dpo(LOGP, REF, PAIRED, beta=0.5, length_normalised=True)
    first = math.log(sigma(0.5 * (1.0 - -1.0)))
    assert found.value_BT[:2].flatten().tolist() == pytest.approx([first] * 6)
    assert found.value_BT[2:].flatten().tolist() == pytest.approx([math.log(0.5)] * 6)
    assert found.shown["preference_margin"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.shown["preference_accuracy"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.claim("DPO summed over tokens")
def test_the_usual_form_sums_over_tokens() -> None:
    found = dpo(LOGP, REF, PAIRED, beta=0.5, length_normalised=False)
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
