"""Optimizer steps over mini-batches: where log-probabilities, objective, weights and engine meet.

Legend: B rows of a micro-batch, O their longest output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from pipeline.residency import resident
from stages.kernels.objective import GRPOTerms, grpo, sequence_mean_weights
from stages.models import Checkpoint, load_model
from stages.training.batching import Batch, Row, micro_batches
from stages.training.config import TrainingConfig
from stages.training.engine import Engine
from stages.training.forward import completion_logprobs
from stages.update.config import GRPOConfig, UpdateConfig
from stages.update.examples import Example, drop_idle

__all__ = ["Ledger", "MiniBatch", "optimizer_step", "reference_model"]


def reference_model(reference: Checkpoint, like: Engine, config: TrainingConfig) -> torch.nn.Module:
    """pi_ref, frozen and kept warm for as long as it is the reference; its parameters have the dtype of the engine's."""
    dtype = next(like.model.parameters()).dtype

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_model(reference, dtype=dtype, attention=config.attention)
        return model.to(like.device).requires_grad_(False)

    return resident("reference", (reference.digest, dtype, like.device, config.attention), load)


@dataclass
class MiniBatch:
    """What one optimizer step learns from: micro-batches with advantages, and the log-probabilities of fixed policies."""

    batches: list[Batch]
    advantage: list[Tensor]
    "[B, O] of each micro-batch."
    weight: list[Tensor]
    "Weight of each token in the mini-batch's mean, [B, O] of each micro-batch."
    temperature: float
    old_logp: list[Tensor] | None = None
    "log pi_old, [B, O] of each micro-batch; None = pi_old is the policy as it is at the step."
    ref_logp: list[Tensor] | None = None
    "log pi_ref, likewise; None = no reference (beta is 0)."

    @classmethod
    def of(cls, examples: Sequence[Example], engine: Engine, temperature: float, config: UpdateConfig) -> Self:
        """Micro-batches of `examples` on the engine's device."""
        # 1/G counts every output of the mini-batch, the ones that need no computing included.
        outputs = sum(example.weight for example in examples)
        computed = drop_idle(examples) if config.objective.beta == 0 else list(examples)
        rows = [Row(example.prompt_ids, example.output_ids) for example in computed]
        batches = [batch.to(engine.device) for batch in micro_batches(rows, config.micro_batch_tokens)]
        advantage, weight = [], []
        for batch in batches:
            members = [computed[row] for row in batch.rows]
            mask_BO = batch.output_mask_BO
            advantage.append(_spread([value for member in members for value in member.advantage], mask_BO))
            weight_B = torch.tensor([member.weight for member in members], device=mask_BO.device)
            weight.append(sequence_mean_weights(mask_BO, weight_B, outputs=outputs))
        return cls(batches, advantage, weight, temperature)

    @torch.no_grad()
    def logprobs(self, model: torch.nn.Module, engine: Engine) -> list[Tensor]:
        """log pi of the outputs under `model`, computed just as the engine computes its own.

        Same micro-batches, same precision: a model of equal weights gives bit-equal values, so that KL is exactly 0 at the
        first step of an iteration.
        """
        with engine.autocast():
            return [completion_logprobs(model, batch, self.temperature).logp_BO for batch in self.batches]


def optimizer_step(engine: Engine, mini_batch: MiniBatch, objective: GRPOConfig, ledger: Ledger) -> None:
    """One step up the gradient of Eq. 3 over a mini-batch; gradients of its micro-batches add up to the batch's own."""
    last = len(mini_batch.batches) - 1
    for number, batch in enumerate(mini_batch.batches):
        with engine.autocast():
            logp_BO, entropy_BO, _ = completion_logprobs(engine.model, batch, mini_batch.temperature, with_entropy=True)
        old_logp_BO = logp_BO.detach() if mini_batch.old_logp is None else mini_batch.old_logp[number]
        ref_logp_BO = None if mini_batch.ref_logp is None else mini_batch.ref_logp[number]
        terms = grpo(
            logp_BO, old_logp_BO, ref_logp_BO, mini_batch.advantage[number], eps=objective.eps, beta=objective.beta
        )
        loss = -(mini_batch.weight[number] * terms.objective_BT).sum()
        engine.backward(loss, last=number == last)
        ledger.add(batch, mini_batch.weight[number], terms, entropy_BO, float(loss.detach()))
    if mini_batch.batches:
        step = engine.step()
        ledger.stepped(step.grad_norm, step.learning_rate, skipped=step.skipped)
    else:
        # beta = 0 and every group agrees with itself: the gradient is zero, and so is the step.
        ledger.stepped(0.0, 0.0, skipped=True)


@dataclass
class Ledger:
    """Sums over micro-batches and steps, weighted like the loss itself: the mean over outputs of the mean over tokens."""

    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0
    ratio_min: float = math.inf
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    learning_rate: float = 0.0

    def add(self, batch: Batch, weight_BO: Tensor, terms: GRPOTerms, entropy_BO: Tensor | None, loss: float) -> None:
        """Account for one micro-batch."""
        parts = {
            "kl": terms.kl_BT,
            "clip_fraction": terms.clipped_BT,
            "ratio_mean": terms.ratio_BT,
            "entropy": entropy_BO,
        }
        for name, values_BO in parts.items():
            if values_BO is not None:
                self._sum(name, float((weight_BO * values_BO).sum()))
        self._sum("loss", loss)
        self._sum("weight", float(weight_BO.sum()))
        ratio_N = terms.ratio_BT[batch.output_mask_BO]
        self.ratio_max = max(self.ratio_max, float(ratio_N.max()))
        self.ratio_min = min(self.ratio_min, float(ratio_N.min()))
        self.tokens += int(batch.attention_mask_BT.sum())

    def stepped(self, grad_norm: float, learning_rate: float, *, skipped: bool) -> None:
        """Account for one optimizer step."""
        self.steps += 1
        self.skipped += skipped
        self.learning_rate = learning_rate
        self._sum("grad_norm", grad_norm if math.isfinite(grad_norm) else 0.0)

    def metrics(self, *, beta: float, seconds: float, computed: int) -> dict[str, float]:
        """Means over the exploration stage's optimizer steps, under the names MLflow shows."""
        mean = {name: value / self.steps for name, value in self.sums.items()}
        # Ratio, KL and entropy are means over what was computed, also where idle rows were left out of it.
        share = mean.pop("weight", 0.0)
        for name in ("kl", "clip_fraction", "ratio_mean", "entropy"):
            mean[name] = mean[name] / share if share else math.nan
        return {f"policy/{name}": value for name, value in mean.items()} | {
            "policy/policy_loss": mean.get("loss", 0.0) - beta * mean["kl"],
            "policy/ratio_max": self.ratio_max,
            "policy/ratio_min": self.ratio_min,
            "policy/learning_rate": self.learning_rate,
            "policy/skipped_steps": self.skipped,
            "policy/outputs_computed": computed,
            "policy/tokens_per_s": self.tokens / seconds,
            "time/update": seconds,
        }

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value


def _spread(values: Sequence[float], mask_BO: Tensor) -> Tensor:
    """Per-token values of row after row in the layout of `mask_BO`, 0 on padding."""
    flat_N = torch.tensor(values, dtype=torch.float32, device=mask_BO.device)
    return torch.zeros(mask_BO.shape, dtype=torch.float32, device=mask_BO.device).masked_scatter(mask_BO, flat_N)
