"""What one optimizer step learns from: micro-batches as tensors, with the weight of every token in the whole.

Legend: B rows of a micro-batch, O their longest output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, assert_never

import torch
from torch import Tensor

from stages.kernels.aggregation import constant_weights, sequence_mean_weights, token_mean_weights
from stages.training.batching import Batch, Row, micro_batches, own_share
from stages.training.engine import Engine
from stages.training.forward import completion_logprobs
from stages.update.config import UpdateConfig
from stages.update.examples import Example, drop_idle
from stages.update.objectives.method import Method

__all__ = ["MicroBatch", "MiniBatch", "Recorded"]


@dataclass(frozen=True)
class Recorded:
    """What the rollout engine recorded, a row for each output that was sampled: R of them, equal ones not merged."""

    logp_RO: Tensor
    row_R: Tensor
    """The row of the micro-batch that the output is computed in."""

    def to(self, device: str) -> Recorded:
        """The same on a device."""
        return Recorded(self.logp_RO.to(device), self.row_R.to(device))


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward; tensors are [B, O] of `batch`."""

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
        """The same on a device."""
        moved: dict[str, Any] = {
            field.name: part.to(device)
            for field in dataclasses.fields(self)
            if isinstance(part := getattr(self, field.name), Tensor | Batch | Recorded)
        }
        return dataclasses.replace(self, **moved)

    def share(self, factor: float) -> MicroBatch:
        """What a rank computes of it, `factor` being 0 where another rank accounts for it."""
        recorded = self.recorded if factor else None
        return dataclasses.replace(self, weight=factor * self.weight, recorded=recorded, counts=bool(factor))


@dataclass
class MiniBatch:
    """The micro-batches of one optimizer step."""

    parts: list[MicroBatch]
    temperature: float

    @classmethod
    def of(
        cls, examples: Sequence[Example], engine: Engine, temperature: float, config: UpdateConfig, method: Method
    ) -> Self:
        """This rank's micro-batches of `examples`, on its device.

        Denominators count every example of the mini-batch, whatever rank computes it and whether it needs computing at all.
        """
        computed = drop_idle(examples) if method.skips_idle else list(examples)
        rows = [Row(example.prompt_ids, example.output_ids) for example in computed]
        whole = list(micro_batches(rows, config.micro_batch_tokens, together=2 if method.pairs else 1))
        parts = []
        for batch, factor in own_share(whole, rank=engine.rank, world_size=engine.world_size):
            parts.append(_micro_batch(batch, computed, examples, method).to(engine.device).share(factor))
        return cls(parts, temperature)

    @torch.no_grad()
    def logprobs(self, model: torch.nn.Module, engine: Engine) -> list[Tensor]:
        """log pi of the outputs under `model`, computed just as the engine computes its own.

        Same micro-batches, same precision: a model of equal weights gives bit-equal values, so that KL is exactly 0 at the
        first step of an iteration.
        """
        with engine.autocast():
            return [
                completion_logprobs(model, part.batch, self.temperature, max_logits=engine.max_logits).logp_BO
                for part in self.parts
            ]

    def compare_with(self, reference: torch.nn.Module, engine: Engine) -> None:
        """Fill in log pi_ref."""
        found = self.logprobs(reference, engine)
        self.parts = [dataclasses.replace(part, ref_logp=logp) for part, logp in zip(self.parts, found, strict=True)]

    def take_policy_as_reference(self) -> None:
        """pi_ref is the policy before the step that this is learned from: KL is 0, and no forward is needed to say so."""
        self.parts = [dataclasses.replace(part, ref_is_policy=True) for part in self.parts]

    def remember_policy(self, engine: Engine) -> None:
        """Fill in log pi_old from the policy as it is now."""
        found = self.logprobs(engine.model, engine)
        self.parts = [dataclasses.replace(part, old_logp=logp) for part, logp in zip(self.parts, found, strict=True)]

    def trust_rollout(self) -> None:
        """Fill in log pi_old from what the rollout engine recorded."""
        self.parts = [dataclasses.replace(part, old_logp=part.rollout_logp) for part in self.parts]


def _micro_batch(batch: Batch, computed: Sequence[Example], examples: Sequence[Example], method: Method) -> MicroBatch:
    members = [computed[row] for row in batch.rows]
    mask_BO = batch.output_mask_BO
    advantage_BO = _spread([value for member in members for value in member.advantage], mask_BO)
    rollout_BO = None
    if all(member.rollout_logp is not None for member in members):
        rollout_BO = _spread([value for member in members for value in member.rollout_logp or ()], mask_BO)
    ref_BO = None
    if all(member.ref_logp is not None for member in members):
        ref_BO = _spread([value for member in members for value in member.ref_logp or ()], mask_BO)
    weight_B = torch.tensor([member.weight for member in members])
    weight_BO = _weights(mask_BO, weight_B, examples, method)
    return MicroBatch(batch, advantage_BO, weight_BO, rollout_BO, ref_logp=ref_BO, recorded=_recorded(members, mask_BO))


def _recorded(members: Sequence[Example], mask_BO: Tensor) -> Recorded | None:
    """What was recorded for the outputs behind `members`; None where nothing was."""
    row_R = torch.tensor([row for row, member in enumerate(members) for _ in member.recorded], dtype=torch.long)
    if not len(row_R):
        return None
    values = [value for member in members for output in member.recorded for value in output]
    return Recorded(_spread(values, mask_BO[row_R]), row_R)


def _weights(mask_BO: Tensor, weight_B: Tensor, examples: Sequence[Example], method: Method) -> Tensor:
    outputs = sum(example.weight for example in examples)
    match method.aggregation:
        case "sequence_mean":
            return sequence_mean_weights(mask_BO, weight_B, outputs=outputs)
        case "token_mean":
            tokens = sum(example.weight * len(example.output_ids) for example in examples)
            return token_mean_weights(mask_BO, weight_B, tokens=tokens)
        case "constant":
            return constant_weights(mask_BO, weight_B, outputs=outputs, length=method.length)
        case _ as unknown:
            assert_never(unknown)


def _spread(values: Sequence[float], mask_BO: Tensor) -> Tensor:
    """Per-token values of row after row in the layout of `mask_BO`, 0 on padding."""
    flat_N = torch.tensor(values, dtype=torch.float32)
    return torch.zeros(mask_BO.shape, dtype=torch.float32).masked_scatter(mask_BO, flat_N)
