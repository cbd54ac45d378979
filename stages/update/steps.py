"""One optimizer step: where log-probabilities, objective, KL term, weights and engine meet.

    J = sum_{i,t} w_{i,t} ( c_{i,t} surrogate_{i,t} - beta D_{i,t} )

w: the aggregation's weights; c: the correction for the rollout engine (1 without one); D: the KL estimator. Legend: B rows of a
micro-batch, O their longest output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, assert_never

import torch
from torch import Tensor

from stages.kernels import divergence
from stages.kernels.correction import sequence_truncated, token_truncated
from stages.kernels.objective import Surrogate
from stages.training.engine import Engine
from stages.training.forward import completion_logprobs
from stages.update.config import NoCorrectionConfig, TruncatedCorrectionConfig
from stages.update.ledger import Ledger
from stages.update.minibatch import MicroBatch, MiniBatch
from stages.update.objectives.method import Method, Tokens

__all__ = ["Correction", "Terms", "micro_batch_terms", "optimizer_step"]

Correction = NoCorrectionConfig | TruncatedCorrectionConfig
LARGEST_WEIGHT: Final = math.exp(20)
"""What a weight before its cap is shown as at most."""


@dataclass(frozen=True)
class Terms:
    """The parts of J for each token of a micro-batch, [B, O]."""

    objective_BO: Tensor
    """c surrogate - beta D, with gradient."""
    old_logp_BO: Tensor
    """log pi_old."""
    surrogate: Surrogate
    kl_BO: Tensor | None
    """D, detached; None without a reference."""
    correction_BO: Tensor | None
    """c; None without a correction."""
    raw_correction_BO: Tensor | None
    """c before its cap."""


def optimizer_step(
    engine: Engine, mini_batch: MiniBatch, method: Method, correction: Correction, ledger: Ledger
) -> None:
    """One step up the gradient of J over a mini-batch; gradients of its micro-batches add up to the batch's own.

    Raises:
        MismatchError: before the step, where the outputs are not what the trainer takes them for.
    """
    last = len(mini_batch.parts) - 1
    for number, part in enumerate(mini_batch.parts):
        with engine.autocast():
            logp_BO, entropy_BO, _ = completion_logprobs(
                engine.model, part.batch, mini_batch.temperature, with_entropy=True, max_logits=engine.max_logits
            )
        terms = micro_batch_terms(logp_BO, part, method, correction)
        loss = -(part.weight.to(logp_BO.dtype) * terms.objective_BO).sum()
        engine.backward(loss, last=number == last)
        ledger.add(part, terms, entropy_BO, float(loss.detach()))
    if mini_batch.parts:
        ledger.mismatch.check(engine)
        step = engine.step()
        ledger.stepped(step.grad_norm, step.learning_rate, skipped=step.skipped)
    else:
        # No KL term and no advantage anywhere: the gradient is zero, and so is the step.
        ledger.stepped(0.0, 0.0, skipped=True)


def micro_batch_terms(logp_BO: Tensor, part: MicroBatch, method: Method, correction: Correction) -> Terms:
    """The objective of every token of a micro-batch, given log pi_theta."""
    # Where nothing was computed before, pi_old = pi_theta: its own values, detached, make the ratio exactly 1.
    old_logp_BO = logp_BO.detach() if part.old_logp is None else part.old_logp
    mask_BO = part.batch.output_mask_BO
    ref_logp_BO = logp_BO.detach() if part.ref_is_policy else part.ref_logp
    surrogate = method.surrogate(Tokens(logp_BO, old_logp_BO, ref_logp_BO, part.advantage, mask_BO))
    objective_BO = surrogate.value_BT
    correction_BO, raw_BO = _weights(old_logp_BO, part.rollout_logp, mask_BO, correction)
    if correction_BO is not None:
        objective_BO = correction_BO * objective_BO
    if method.beta == 0 or ref_logp_BO is None:
        return Terms(objective_BO, old_logp_BO, surrogate, None, correction_BO, raw_BO)
    kl_BO = _divergence(logp_BO, ref_logp_BO, old_logp_BO, method)
    return Terms(objective_BO - method.beta * kl_BO, old_logp_BO, surrogate, kl_BO.detach(), correction_BO, raw_BO)


def _divergence(logp_BO: Tensor, ref_logp_BO: Tensor, old_logp_BO: Tensor, method: Method) -> Tensor:
    match method.divergence:
        case "k1":
            return divergence.k1(logp_BO, ref_logp_BO)
        case "k2":
            return divergence.k2(logp_BO, ref_logp_BO)
        case "k3":
            return divergence.k3(logp_BO, ref_logp_BO)
        case "k3_unbiased":
            return divergence.k3_unbiased(logp_BO, ref_logp_BO, old_logp_BO)
        case _ as unknown:
            assert_never(unknown)


@torch.no_grad()
def _weights(
    old_logp_BO: Tensor, rollout_logp_BO: Tensor | None, mask_BO: Tensor, correction: Correction
) -> tuple[Tensor | None, Tensor | None]:
    """c at every token, and what it was before its cap; None without a correction."""
    if isinstance(correction, NoCorrectionConfig):
        return None, None
    assert rollout_logp_BO is not None
    largest = max(correction.cap, LARGEST_WEIGHT)  # a sum of metrics stays finite
    if correction.level == "token":
        raw_BO = token_truncated(old_logp_BO, rollout_logp_BO, cap=largest)
    else:
        normalised = correction.level == "sequence_mean"
        raw_BO = sequence_truncated(old_logp_BO, rollout_logp_BO, mask_BO, cap=largest, normalised=normalised)
    return raw_BO.clamp(max=correction.cap), raw_BO
