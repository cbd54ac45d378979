"""Gradient coefficients of the unified paradigm, one function per row of Table 10 (DeepSeekMath, 5.2 and A.1).

    grad J = E[ (1/|o|) sum_t GC(q, o, t) grad log pi_theta(o_t | q, o_<t) ]                                     (Eq. 5)

Each states what the loss of its row must differentiate to at pi_old = pi_theta. Shapes: B outputs, T tokens, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sft(logp_BT: Tensor) -> Tensor:
    """GC = 1: o comes from the demonstrations (Eq. 7)."""
    return torch.ones_like(logp_BT)


def rft(correct_B: Tensor, logp_BT: Tensor) -> Tensor:
    """GC = I(o): 1 where the answer of o ~ pi_sft is right, else 0 (Eq. 9-10); the mean is over all outputs."""
    return correct_B[:, None].to(logp_BT.dtype).expand_as(logp_BT)


def online_rft(correct_B: Tensor, logp_BT: Tensor) -> Tensor:
    """GC = I(o), with o ~ pi_theta (Eq. 11)."""
    return rft(correct_B, logp_BT)


def dpo(preferred_P: Tensor, rejected_P: Tensor, *, beta: float) -> Tensor:
    """GC = sigma( beta m(o-) - beta m(o+) ), + for the preferred output, - for the other (Eq. 13-14): `[P]`.

    m(o) is the mean log-ratio to the reference over the tokens of o; Eq. 14 writes one token's. The paper drops the factor beta
    that differentiating Eq. 12 leaves: the gradient of the loss is beta times this.
    """
    return torch.sigmoid(beta * (rejected_P - preferred_P))


def ppo(advantage_BT: Tensor) -> Tensor:
    """GC = A_t, by generalised advantage estimation with a learned value function (Eq. 18)."""
    return advantage_BT


def distillation(logp_T: Tensor, teacher_logp_T: Tensor) -> Tensor:
    """GC = log pi_teacher - log pi_theta: minus the gradient of each token's reverse KL, sampled from pi_theta."""
    return teacher_logp_T - logp_T


def grpo(advantage_BT: Tensor, logp_BT: Tensor, ref_logp_BT: Tensor, *, beta: float) -> Tensor:
    """GC = A-hat_{i,t} + beta ( pi_ref / pi_theta - 1 ) (Eq. 21)."""
    return advantage_BT + beta * torch.expm1(ref_logp_BT - logp_BT)
