"""The policy's loss: micro-batches as tensors, with the weight of every token in the whole, and the objective of each token.

    J = sum_{i,t} w_{i,t} ( c_{i,t} surrogate_{i,t} - beta D_{i,t} )

Tokens that an environment wrote (`Rollouts.turns`) have w = 0, are no part of any ratio, sum or |o_i|, and are counted nowhere.

w: the aggregation's weights; c: the correction for the rollout engine (1 without one); D: the KL estimator. Legend: B rows of a
micro-batch, O their longest output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, assert_never

import torch
from torch import Tensor

from stages.kernels.logprobs import sequence_truncated, token_truncated
from stages.kernels.objective import (
    Surrogate,
    constant_weights,
    k1,
    k2,
    k3,
    k3_unbiased,
    sequence_mean_weights,
    token_mean_weights,
)
from stages.training.batching import Batch, Row, micro_batches, own_share, spread
from stages.training.engine import Engine
from stages.training.forward import completion_logprobs
from stages.update.config import NoCorrectionConfig, TruncatedCorrectionConfig, UpdateConfig
from stages.update.objectives.method import Method, Tokens

Correction = NoCorrectionConfig | TruncatedCorrectionConfig
LARGEST_WEIGHT: Final = math.exp(20)
"""What a weight before its cap is shown as at most."""


@dataclass(frozen=True)
class Example:
    """Hold an output o_i with its advantages, for `weight` equal ones."""

    question_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    advantage: tuple[float, ...]
    """A-hat_{i,t}, one value per output id."""
    weight: float
    """How many equal outputs of the group are merged into this one."""
    rollout_logp: tuple[float, ...] | None = None
    """The rollout engine's log-probabilities, one per output id, where the loss reads them; 0 where it sampled none."""
    pair: int | None = None
    """The preference it belongs to, where there are any."""
    ref_logp: tuple[float, ...] | None = field(default=None, compare=False)
    """log pi_ref, one per output id, where it was computed before; equal for equal outputs."""
    recorded: tuple[tuple[float, ...], ...] = field(default=(), compare=False)
    """The rollout engine's log-probabilities of each output merged into this one, where they are only measured: unlike
    those that the loss reads, they keep no two outputs apart."""
    written: tuple[bool, ...] | None = None
    """Whether the policy wrote each output id, or its environment did; None: it wrote all."""

    @property
    def length(self) -> int:
        """Return |o_i|: how many tokens the policy wrote."""
        return len(self.output_ids) if self.written is None else sum(self.written)


def drop_idle(examples: Sequence[Example]) -> list[Example]:
    """Keep examples with an advantage other than 0: without a KL term the others have no gradient, so they cost nothing."""
    return [example for example in examples if any(example.advantage)]


@dataclass(frozen=True)
class Recorded:
    """Hold what the rollout engine recorded, a row for each output that was sampled: R of them, equal ones not merged."""

    logp_RO: Tensor
    row_R: Tensor
    """The row of the micro-batch that the output is computed in."""

    def to(self, device: str) -> Recorded:
        """Return the record on a device."""
        return Recorded(self.logp_RO.to(device), self.row_R.to(device))


@dataclass(frozen=True)
class MicroBatch:
    """Hold one forward and backward; tensors are [B, O] of `batch`."""

    batch: Batch
    advantage: Tensor
    weight: Tensor
    """Weight of each token in the mini-batch's mean, float64."""
    rollout_logp: Tensor | None = None
    """The rollout engine's log-probabilities, where the loss reads them."""
    old_logp: Tensor | None = None
    """log pi_old; None = pi_old is the policy as it is at the step."""
    ref_logp: Tensor | None = None
    """log pi_ref; None = no reference, or `ref_is_policy`."""
    ref_is_policy: bool = False
    """pi_ref is the policy as it is at the step."""
    recorded: Recorded | None = None
    """The rollout engine's log-probabilities, where they are measured."""
    counts: bool = True
    """False: another rank accounts for it, and this one computes it to stay in step; its weights are 0."""

    def to(self, device: str) -> MicroBatch:
        """Return the micro-batch on a device."""
        moved: dict[str, Any] = {
            field.name: part.to(device)
            for field in dataclasses.fields(self)
            if isinstance(part := getattr(self, field.name), Tensor | Batch | Recorded)
        }
        return dataclasses.replace(self, **moved)

    def of_policy(self, values_BO: Tensor) -> Tensor:
        """Return values of tokens with 0 where an environment wrote them: whatever they were, nothing is made of them."""
        observed_BO = self.batch.observed_BO
        return values_BO if observed_BO is None else values_BO.masked_fill(observed_BO, 0.0)

    def share(self, factor: float) -> MicroBatch:
        """Return what a rank computes of it, `factor` being 0 where another rank accounts for it."""
        recorded = self.recorded if factor else None
        return dataclasses.replace(self, weight=factor * self.weight, recorded=recorded, counts=bool(factor))


@dataclass
class MiniBatch:
    """Hold the micro-batches of one optimizer step."""

    parts: list[MicroBatch]
    temperature: float

    @classmethod
    def of(
        cls, examples: Sequence[Example], engine: Engine, temperature: float, config: UpdateConfig, method: Method
    ) -> Self:
        """Return this rank's micro-batches of `examples`, on its device.

        Denominators count every example of the mini-batch, whatever rank computes it and whether it needs computing at all.
        """
        computed = drop_idle(examples) if method.skips_idle else list(examples)
        rows = [Row(example.prompt_ids, example.output_ids, example.written) for example in computed]
        units = [(first, first + 1) for first in range(0, len(rows), 2)] if method.pairs else None
        whole = list(micro_batches(rows, config.micro_batch_tokens, model=engine.model, units=units))
        parts = []
        for batch, factor in own_share(whole, rank=engine.rank, world_size=engine.world_size):
            parts.append(_micro_batch(batch, computed, examples, method).to(engine.device).share(factor))
        return cls(parts, temperature)

    @torch.no_grad()
    def logprobs(self, model: torch.nn.Module, engine: Engine) -> list[Tensor]:
        """Compute log pi of the outputs under `model`, just as the engine computes its own.

        Same micro-batches, same precision: a model of equal weights gives bit-equal values, so that KL is exactly 0 at the
            first step of
        an iteration.
        """
        with engine.autocast():
            return [
                completion_logprobs(model, part.batch, self.temperature, max_logits=engine.max_logits).logp_BO
                for part in self.parts
            ]

    def compare_with(self, reference: torch.nn.Module, engine: Engine) -> None:
        """Fill in log pi_ref."""
        self._fill(reference, engine, "ref_logp")

    def take_policy_as_reference(self) -> None:
        """Take the policy before the step for pi_ref: KL is 0, and no forward is needed to know it."""
        self.parts = [dataclasses.replace(part, ref_is_policy=True) for part in self.parts]

    def remember_policy(self, engine: Engine, *, as_reference: bool = False) -> None:
        """Fill in log pi_old from the policy as it is now, which may be pi_ref as well."""
        self._fill(engine.model, engine, "old_logp", *(["ref_logp"] if as_reference else []))

    def keep_policy(self, part: MicroBatch, old_logp_BO: Tensor) -> None:
        """Fill in log pi_old, and log pi_ref where that is the policy, from the forward of the step: later passes need it."""
        place = next(place for place, own in enumerate(self.parts) if own is part)
        ref_logp = old_logp_BO if part.ref_is_policy else part.ref_logp
        self.parts[place] = dataclasses.replace(part, old_logp=old_logp_BO, ref_logp=ref_logp, ref_is_policy=False)

    def _fill(self, model: torch.nn.Module, engine: Engine, *names: str) -> None:
        for place, logp_BO in enumerate(self.logprobs(model, engine)):
            filled: dict[str, Any] = dict.fromkeys(names, logp_BO)
            self.parts[place] = dataclasses.replace(self.parts[place], **filled)

    def trust_rollout(self) -> None:
        """Fill in log pi_old from what the rollout engine recorded."""
        self.parts = [dataclasses.replace(part, old_logp=part.rollout_logp) for part in self.parts]


def _micro_batch(batch: Batch, computed: Sequence[Example], examples: Sequence[Example], method: Method) -> MicroBatch:
    members = [computed[row] for row in batch.rows]
    mask_BO = batch.output_mask_BO
    return MicroBatch(
        batch,
        advantage=_per_token([member.advantage for member in members], mask_BO),
        weight=_weights(batch.written, torch.tensor([member.weight for member in members]), examples, method),
        rollout_logp=_where_all([member.rollout_logp for member in members], mask_BO),
        ref_logp=_where_all([member.ref_logp for member in members], mask_BO),
        recorded=_recorded(members, mask_BO),
    )


def _recorded(members: Sequence[Example], mask_BO: Tensor) -> Recorded | None:
    """Return what was recorded for the outputs behind `members`; None where nothing was."""
    row_R = torch.tensor([row for row, member in enumerate(members) for _ in member.recorded], dtype=torch.long)
    if not len(row_R):
        return None
    recorded = [output for member in members for output in member.recorded]
    return Recorded(_per_token(recorded, mask_BO[row_R]), row_R)


def _where_all(rows: Sequence[Sequence[float] | None], mask_BO: Tensor) -> Tensor | None:
    """Return per-token values in the layout of the mask; None unless every row has them."""
    given = [row for row in rows if row is not None]
    return _per_token(given, mask_BO) if len(given) == len(rows) else None


def _per_token(rows: Sequence[Sequence[float]], mask_BO: Tensor) -> Tensor:
    return spread(torch.tensor([value for row in rows for value in row], dtype=torch.float32), mask_BO)


def _weights(mask_BO: Tensor, weight_B: Tensor, examples: Sequence[Example], method: Method) -> Tensor:
    outputs = sum(example.weight for example in examples)
    match method.aggregation:
        case "sequence_mean":
            return sequence_mean_weights(mask_BO, weight_B, outputs=outputs)
        case "token_mean":
            tokens = sum(example.weight * example.length for example in examples)
            return token_mean_weights(mask_BO, weight_B, tokens=tokens)
        case "constant":
            return constant_weights(mask_BO, weight_B, outputs=outputs, length=method.length)
        case _ as unknown:
            assert_never(unknown)


@dataclass(frozen=True)
class Terms:
    """Hold the parts of J for each token of a micro-batch, [B, O]."""

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


Account = Callable[[MicroBatch, Terms, Tensor | None, float], None]
"""Takes a micro-batch, the terms of its objective, the entropy of its tokens [B, O] and its loss."""


def policy_loss(
    engine: Engine, temperature: float, method: Method, correction: Correction, account: Account
) -> Callable[[MicroBatch], Tensor]:
    """Return the loss of a micro-batch as a function: minus its share of J, which the trainer minimises."""

    def loss(part: MicroBatch) -> Tensor:
        with engine.autocast():
            logp_BO, entropy_BO, _ = completion_logprobs(
                engine.model, part.batch, temperature, with_entropy=True, max_logits=engine.max_logits
            )
        terms = micro_batch_terms(logp_BO, part, method, correction)
        share = -(part.weight.to(logp_BO.dtype) * terms.objective_BO).sum()
        account(part, terms, entropy_BO, float(share.detach()))
        return share

    return loss


def micro_batch_terms(logp_BO: Tensor, part: MicroBatch, method: Method, correction: Correction) -> Terms:
    """Compute the objective of every token of a micro-batch, given log pi_theta."""
    # Where nothing was computed before, pi_old = pi_theta: its own values, detached, make the ratio exactly 1.
    logp_BO = part.of_policy(logp_BO)
    old_logp_BO = logp_BO.detach() if part.old_logp is None else part.of_policy(part.old_logp)
    ref_logp_BO = logp_BO.detach() if part.ref_is_policy else part.ref_logp
    if ref_logp_BO is not None:
        ref_logp_BO = part.of_policy(ref_logp_BO)
    surrogate = method.surrogate(Tokens(logp_BO, old_logp_BO, ref_logp_BO, part.advantage, part.batch.written))
    objective_BO = surrogate.value_BT
    correction_BO, raw_BO = _correction(old_logp_BO, part.rollout_logp, part.batch.written, correction)
    if correction_BO is not None:
        objective_BO = correction_BO * objective_BO
    if method.beta == 0 or ref_logp_BO is None:
        return Terms(objective_BO, old_logp_BO, surrogate, None, correction_BO, raw_BO)
    kl_BO = _divergence(logp_BO, ref_logp_BO, old_logp_BO, method)
    return Terms(objective_BO - method.beta * kl_BO, old_logp_BO, surrogate, kl_BO.detach(), correction_BO, raw_BO)


def _divergence(logp_BO: Tensor, ref_logp_BO: Tensor, old_logp_BO: Tensor, method: Method) -> Tensor:
    match method.divergence:
        case "k1":
            return k1(logp_BO, ref_logp_BO)
        case "k2":
            return k2(logp_BO, ref_logp_BO)
        case "k3":
            return k3(logp_BO, ref_logp_BO)
        case "k3_unbiased":
            return k3_unbiased(logp_BO, ref_logp_BO, old_logp_BO)
        case _ as unknown:
            assert_never(unknown)


@torch.no_grad()
def _correction(
    old_logp_BO: Tensor, rollout_logp_BO: Tensor | None, mask_BO: Tensor, correction: Correction
) -> tuple[Tensor | None, Tensor | None]:
    """Return c at every token, and what it was before its cap; None without a correction."""
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
