"""What an exploration stage's optimizer steps did, as metrics: the same names for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from stages.training.engine import Engine, largest
from stages.update.minibatch import MicroBatch
from stages.update.mismatch import MismatchGauge

if TYPE_CHECKING:
    from stages.update.steps import Terms

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Sums over micro-batches and steps, weighted like the loss itself."""

    sums: dict[str, float] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)
    ratio_max: float = 0.0
    ratio_min: float = math.inf
    steps: int = 0
    skipped: int = 0
    tokens: float = 0
    places: float = 0
    """Tokens with their padding."""
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    mismatch: MismatchGauge = field(default_factory=MismatchGauge)

    def add(self, part: MicroBatch, terms: Terms, entropy_BO: Tensor | None, loss: float) -> None:
        """Account for one micro-batch."""
        surrogate = terms.surrogate
        parts = {
            "kl": terms.kl_BO,
            "clip_fraction": surrogate.clipped_BT,
            "ratio_mean": surrogate.ratio_BT,
            "entropy": entropy_BO,
            "correction_mean": terms.correction_BO,
            "correction_raw_mean": terms.raw_correction_BO,
            "correction_clipped": _above(terms.raw_correction_BO, terms.correction_BO),
            **surrogate.shown,
        }
        for name, values_BO in parts.items():
            if values_BO is not None:
                self.shown.add(name)
                self._sum(name, float((part.weight * values_BO).sum()))
        self._sum("loss", loss)
        self._sum("weight", float(part.weight.sum()))
        if not part.counts:
            return
        ratio_N = surrogate.ratio_BT[part.batch.output_mask_BO]
        self.ratio_max = max(self.ratio_max, float(ratio_N.max()))
        self.ratio_min = min(self.ratio_min, float(ratio_N.min()))
        self.tokens += int(part.batch.attention_mask_BT.sum())
        self.places += part.batch.attention_mask_BT.numel()
        if part.recorded is not None:
            self.mismatch.add(terms.old_logp_BO, part.batch.output_mask_BO, part.recorded.logp_RO, part.recorded.row_R)

    def stepped(self, grad_norm: float, learning_rate: float, *, skipped: bool) -> None:
        """Account for one optimizer step."""
        self.steps += 1
        self.skipped += skipped
        self.learning_rate = learning_rate
        self.grad_norm += grad_norm if math.isfinite(grad_norm) else 0.0

    def add_up(self, engine: Engine) -> None:
        """Make what was noted that of all ranks, which call it together."""
        self.sums = {name: engine.total(value) for name, value in sorted(self.sums.items())}
        self.tokens, self.places = engine.total(self.tokens), engine.total(self.places)
        self.ratio_max, self.ratio_min = largest(engine, self.ratio_max), -largest(engine, -self.ratio_min)

    def metrics(self, *, beta: float, seconds: float, computed: int) -> dict[str, float]:
        """Means over the exploration stage's optimizer steps, under the names MLflow shows."""
        mean = {name: value / self.steps for name, value in self.sums.items()}
        # The loss holds beta times the weighted sum of D, which is the mean of D only where the weights add up to 1.
        policy_loss = mean.get("loss", 0.0) - beta * mean.get("kl", 0.0)
        # Ratio, KL and entropy are means over what was computed, also where idle rows were left out of it.
        share = mean.pop("weight", 0.0)
        mean |= {name: mean[name] / share for name in self.shown if share}
        if self.tokens:
            mean |= {"ratio_max": self.ratio_max, "ratio_min": self.ratio_min}
            mean |= {"padding_share": 1 - self.tokens / self.places}
        return {f"policy/{name}": value for name, value in mean.items()} | {
            "policy/policy_loss": policy_loss,
            "policy/grad_norm": self.grad_norm / self.steps,
            "policy/learning_rate": self.learning_rate,
            "policy/skipped_steps": self.skipped,
            "policy/outputs_computed": computed,
            "policy/tokens_per_s": self.tokens / seconds,
            "time/update": seconds,
        }

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value


def _above(raw_BO: Tensor | None, kept_BO: Tensor | None) -> Tensor | None:
    """1 where a weight was cut at its cap."""
    return None if raw_BO is None or kept_BO is None else (raw_BO > kept_BO).to(raw_BO.dtype)
