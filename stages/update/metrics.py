"""Sum up an update's optimizer steps as metrics of the same names for every method, and compare rollout engine with trainer.

The figures of mismatch cost no forward: they compare what the engine recorded with the log-probabilities that the update
computes anyhow, from the policy before its first step. So they cover the outputs that the update computes: not those masked
out (null advantage) nor, without a KL term, those whose advantage is 0. Equal outputs of a question, though computed once,
count each with its own record. All tokens weigh alike, whatever the loss does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from stages.update.config import MismatchLimits

if TYPE_CHECKING:
    from torch import Tensor

    from stages.training.engine import Engine, StepReport
    from stages.update.loss import MicroBatch, Terms

MEAN: Final = "rollout/mismatch_mean"
LARGEST: Final = "rollout/mismatch_max"
DIVERGENCE: Final = "rollout/mismatch_kl"
EFFECTIVE: Final = "rollout/mismatch_ess"


class MismatchError(ValueError):
    """The trainer does not find the log-probabilities that the engine recorded; names figure, limit and likely causes."""


def check_mismatch(figures: Mapping[str, float], limits: MismatchLimits) -> None:
    """Compare an update's figures with the limits that are set; one that was not measured passes.

    Raises:
        MismatchError: a limit is passed.
    """
    given = limits.given
    wrong = [
        f"{what} {found:.3g} is above update.mismatch.{name}={given[name]:g}"
        for what, found, name in (
            ("a mean difference of nats per token of", figures.get(MEAN), "max_mean"),
            ("a divergence in nats per token of", figures.get(DIVERGENCE), "max_kl"),
        )
        if name in given and found is not None and not found <= given[name]
    ]
    share = figures.get(EFFECTIVE)
    if "min_ess" in given and share is not None and not share >= given["min_ess"]:
        least = f"update.mismatch.min_ess={given['min_ess']:g}"
        wrong.append(f"an effective sample size of {share:.3g} of the outputs is below {least}")
    if wrong:
        raise MismatchError(
            "the trainer does not find the log-probabilities that the rollout engine recorded for its outputs: "
            f"{'; '.join(wrong)}. Did the engine hold other weights than the policy (stale, or a LoRA adapter not merged), "
            "compute in another precision (rollout.backend.dtype, update.training.precision), leave out tokens (top-p, top-k), "
            "or report log-probabilities at another temperature? Fix that and sample again; or weigh the outputs by it "
            "(update.correction.kind=truncated), or change the limit"
        )


class _Span(NamedTuple):
    """Bound `update.mismatch.max_kl=auto`, in nats per token."""

    factor: float
    """Of the first update's divergence."""
    least: float
    most: float


_ROUNDED: Final = _Span(10.0, 2e-3, 0.05)
"""In bfloat16 rounding grows with the logits: larger models begin with more, and flat policies with less than they end with."""
_EXACT: Final = _Span(1000.0, 1e-9, 1e-3)
"""In float32 rounding (1e-14 to 1e-12) and one update are decades apart; GPUs may multiply float32 with fewer bits."""


def staleness_limit(first: float | None, *, exact: bool) -> float:
    """Return `max_kl` where it is `auto`: what a divergence of fresh weights stays below.

    Args:
        first: divergence at the run's first update, whose engine was probed when it started; None: it is to be made.
        exact: whether engine and trainer both compute in float32.
    """
    span = _EXACT if exact else _ROUNDED
    return span.most if first is None else min(max(span.least, span.factor * first), span.most)


@dataclass
class Mismatch:
    """Sum over micro-batches; a second pass over the same outputs changes none of the figures."""

    limits: MismatchLimits = field(default_factory=MismatchLimits)
    tokens: float = 0
    difference: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0
    log_weights: list[float] = field(default_factory=list)

    def add(self, logp_BO: Tensor, mask_BO: Tensor, recorded_RO: Tensor, row_R: Tensor) -> None:
        """Account for one micro-batch.

        Args:
            logp_BO: log pi of the policy before its first step.
            mask_BO: True on tokens that the policy wrote.
            recorded_RO: what the engine recorded, a row for each output that was sampled.
            row_R: the row b of the micro-batch that output r is computed in; equal outputs share one.
        """
        from stages.kernels.logprobs import token_mismatch

        found = token_mismatch(logp_BO[row_R], recorded_RO, mask_BO[row_R])
        self.tokens += found.tokens
        self.difference += found.difference
        self.largest = max(self.largest, found.largest)
        self.divergence += found.divergence
        self.log_weights += found.log_weight_R.tolist()

    def figures(self, engine: Engine) -> dict[str, float]:
        """Return `rollout/mismatch_*` over the outputs of all ranks, which call it together; empty where nothing was measured.

        `mean`, `max`: of |log pi_trainer - log pi_engine|, in nats, over tokens. `kl`: D_KL[pi_engine || pi_trainer] in nats
            per token,
        estimated by k3. `ess`: effective sample size of the outputs' importance ratios, as a share of the outputs.
        """
        import torch

        from stages.kernels.logprobs import WeightSums, effective_share, weight_sums
        from stages.training.engine import largest

        tokens, outputs = engine.total(self.tokens), engine.total(len(self.log_weights))
        if not tokens:
            return {}
        shift = largest(engine, max(self.log_weights, default=-float("inf")))
        own = weight_sums(torch.tensor(self.log_weights, dtype=torch.float64), shift=shift)
        return {
            MEAN: engine.total(self.difference) / tokens,
            LARGEST: largest(engine, self.largest),
            DIVERGENCE: engine.total(self.divergence) / tokens,
            EFFECTIVE: effective_share(WeightSums(*(engine.total(part) for part in own)), int(outputs)),
        }

    def check(self, engine: Engine) -> None:
        """Compare what was measured so far with the limits; without any, ranks exchange nothing.

        Raises:
            MismatchError: a limit is passed; on all ranks alike.
        """
        if self.limits.given:
            check_mismatch(self.figures(engine), self.limits)


@dataclass
class UpdateMetrics:
    """Sum over micro-batches and steps, weighted like the loss itself."""

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
    mismatch: Mismatch = field(default_factory=Mismatch)

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
        ratio_N = surrogate.ratio_BT[part.batch.written]
        self.ratio_max = max(self.ratio_max, float(ratio_N.max()))
        self.ratio_min = min(self.ratio_min, float(ratio_N.min()))
        self.tokens += part.batch.tokens
        self.places += part.batch.input_ids_BT.numel()
        if part.recorded is not None:
            self.mismatch.add(terms.old_logp_BO, part.batch.written, part.recorded.logp_RO, part.recorded.row_R)

    def stepped(self, step: StepReport) -> None:
        """Account for one optimizer step."""
        self.steps += 1
        self.skipped += step.skipped
        self.learning_rate = step.learning_rate
        self.grad_norm += step.grad_norm if math.isfinite(step.grad_norm) else 0.0

    def all_reduce(self, engine: Engine) -> None:
        """Make the sums those of all ranks, which call it together."""
        from stages.training.engine import largest

        self.sums = {name: engine.total(value) for name, value in sorted(self.sums.items())}
        self.tokens, self.places = engine.total(self.tokens), engine.total(self.places)
        self.ratio_max, self.ratio_min = largest(engine, self.ratio_max), -largest(engine, -self.ratio_min)

    def metrics(self, *, beta: float, seconds: float, computed: int) -> dict[str, float]:
        """Return means over the exploration stage's optimizer steps, under the names MLflow shows."""
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
    """Return 1 where a weight was cut at its cap."""
    return None if raw_BO is None or kept_BO is None else (raw_BO > kept_BO).to(raw_BO.dtype)
