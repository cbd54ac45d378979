"""KL estimators: golden values, precision, and what each one's gradient does to a policy on a bandit with known KL."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from stages.kernels.divergence import k1, k2, k3, k3_unbiased

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
