"""Least squares between values and returns: where forward, weights and engine meet.

Legend: B rows of a micro-batch, O their longest output, N output tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from stages.critic.examples import Example
from stages.critic.forward import values_before
from stages.kernels.aggregation import sequence_mean_weights
from stages.training.batching import Batch, Row, micro_batches, own_share
from stages.training.engine import Engine, StepReport

__all__ = ["Fit", "Part"]


@dataclass(frozen=True)
class Part:
    """A micro-batch; tensors are [B, O] of `batch`."""

    batch: Batch
    return_BO: Tensor
    weight_BO: Tensor
    """Weight of each token in the mini-batch's mean over outputs of the mean over tokens; sums to 1 over its parts of all
    ranks. 0 on padding, and throughout where the part is another rank's and only fills up this rank's passes."""


@dataclass
class Fit:
    """Squared errors over micro-batches, this rank's share of them, and what the steps over them found."""

    mini_batches: list[list[Part]]
    losses: list[float] = field(default_factory=list)
    """One for each step, before it."""
    reports: list[StepReport] = field(default_factory=list)
    first_value_N: list[Tensor] = field(default_factory=list)
    """Values before the first step that learns from them, one vector for each part."""

    @classmethod
    def of(cls, hands: Sequence[Sequence[Example]], engine: Engine, micro_batch_tokens: int) -> Self:
        """This rank's parts of the mini-batches that have any, on the engine's device."""
        return cls([cls._parts(examples, engine, micro_batch_tokens) for examples in hands if examples])

    @staticmethod
    def _parts(examples: Sequence[Example], engine: Engine, micro_batch_tokens: int) -> list[Part]:
        rows = [Row(example.prompt_ids, example.output_ids) for example in examples]
        batches = list(micro_batches(rows, micro_batch_tokens))
        outputs = sum(example.weight for example in examples)
        parts = []
        for batch, factor in own_share(batches, rank=engine.rank, world_size=engine.world_size):
            mask_BO = batch.output_mask_BO
            flat_N = torch.tensor([value for row in batch.rows for value in examples[row].returns])
            return_BO = torch.zeros(mask_BO.shape).masked_scatter(mask_BO, flat_N)
            count_B = factor * torch.tensor([examples[row].weight for row in batch.rows])
            weight_BO = sequence_mean_weights(mask_BO, count_B, outputs=outputs)
            parts.append(Part(batch.to(engine.device), return_BO.to(engine.device), weight_BO.to(engine.device)))
        return parts

    def step(self, engine: Engine) -> None:
        """One optimizer step down the gradient of the next mini-batch's weighted squared error."""
        loss, done = 0.0, len(self.losses)
        parts = self.mini_batches[done % len(self.mini_batches)]
        for number, part in enumerate(parts):
            with engine.autocast():
                value_BO = values_before(engine.model, part.batch)
            error = (part.weight_BO * 0.5 * (value_BO - part.return_BO).square()).sum()
            engine.backward(error, last=number == len(parts) - 1)
            loss += float(error.detach())
            if done < len(self.mini_batches):
                self.first_value_N.append(value_BO.detach()[part.weight_BO > 0])
        self.losses.append(engine.total(loss))
        self.reports.append(engine.step())

    def metrics(self, engine: Engine, *, idle: int = 0) -> dict[str, float | None]:
        """Loss and gradient norm as means over the steps; values (before the first step that learns from them) and returns as
        the loss weighs them.

        Args:
            idle: steps that were not made, since their mini-batch had no output.
        """
        value_N = torch.cat(self.first_value_N).double()
        parts = [part for mini_batch in self.mini_batches for part in mini_batch]
        return_N = torch.cat([part.return_BO[part.weight_BO > 0] for part in parts]).double()
        weight_N = torch.cat([part.weight_BO[part.weight_BO > 0] for part in parts])
        steps = len(self.reports)

        def mean(values_N: Tensor) -> float:
            return engine.total(float((weight_N * values_N).sum())) / engine.total(float(weight_N.sum()))

        return {
            "critic/loss": sum(self.losses) / steps,
            "critic/grad_norm": sum(report.grad_norm for report in self.reports) / steps,
            "critic/learning_rate": self.reports[-1].learning_rate,
            "critic/skipped_steps": idle + sum(report.skipped for report in self.reports),
            "critic/value_mean": mean(value_N),
            "critic/return_mean": mean(return_N),
            "critic/explained_variance": _explained_variance(value_N, return_N, mean),
        }


def _explained_variance(value_N: Tensor, return_N: Tensor, mean: Callable[[Tensor], float]) -> float | None:
    """1 - Var(return - V) / Var(return): 1 for a perfect critic, 0 for a constant; None where all returns are equal."""
    total = mean((return_N - mean(return_N)).square())
    # Returns are float32: what they differ by in rounding only is no variance.
    if total <= 1e-14 * mean(return_N.square()):
        return None
    error_N = return_N - value_N
    return 1 - mean((error_N - mean(error_N)).square()) / total
