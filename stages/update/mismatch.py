"""Rollout engine against trainer on the outputs of one update: how far apart, and from where on the run shall stop.

The figures cost no forward: they compare what the engine recorded with the log-probabilities that the update computes anyhow,
from the policy as it is before its first step. So they cover the outputs that the update computes: not those masked out (null
advantage), nor, where there is no KL term, those whose advantage is 0. Equal outputs of a question, though computed once, count
each with what the engine recorded for it. All tokens weigh alike, whatever the loss does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from stages.update.config import MismatchLimits

if TYPE_CHECKING:
    from torch import Tensor

    from stages.training.engine import Engine

__all__ = ["MismatchError", "MismatchGauge", "check_mismatch"]

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
    wrong = [
        f"{what} {found:.3g} is above update.mismatch.{name}={limit:g}"
        for what, found, name, limit in (
            ("a mean difference of nats per token of", figures.get(MEAN), "max_mean", limits.max_mean),
            ("a divergence in nats per token of", figures.get(DIVERGENCE), "max_kl", limits.max_kl),
        )
        if limit is not None and found is not None and not found <= limit
    ]
    share = figures.get(EFFECTIVE)
    if limits.min_ess is not None and share is not None and not share >= limits.min_ess:
        least = f"update.mismatch.min_ess={limits.min_ess:g}"
        wrong.append(f"an effective sample size of {share:.3g} of the outputs is below {least}")
    if wrong:
        raise MismatchError(
            "the trainer does not find the log-probabilities that the rollout engine recorded for its outputs: "
            f"{'; '.join(wrong)}. Did the engine hold other weights than the policy (stale, or a LoRA adapter not merged), "
            "compute in another precision (rollout.backend.dtype, update.training.precision), leave out tokens (top-p, top-k), "
            "or report log-probabilities at another temperature? Mend that and sample again; or weigh the outputs by it "
            "(update.correction.kind=truncated), or change the limit"
        )


@dataclass
class MismatchGauge:
    """Sums over micro-batches; a second pass over the same outputs changes none of the figures."""

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
            mask_BO: True on output tokens.
            recorded_RO: what the engine recorded, a row for each output that was sampled.
            row_R: the row b of the micro-batch that output r is computed in; equal outputs share one.
        """
        from stages.kernels.mismatch import token_mismatch

        found = token_mismatch(logp_BO[row_R], recorded_RO, mask_BO[row_R])
        self.tokens += found.tokens
        self.difference += found.difference
        self.largest = max(self.largest, found.largest)
        self.divergence += found.divergence
        self.log_weights += found.log_weight_R.tolist()

    def figures(self, engine: Engine) -> dict[str, float]:
        """`rollout/mismatch_*` over the outputs of all ranks, which call it together; empty where nothing was measured.

        `mean`, `max`: of |log pi_trainer - log pi_engine|, in nats, over tokens. `kl`: D_KL[pi_engine || pi_trainer] in nats
        per token, estimated by k3. `ess`: effective sample size of the outputs' importance ratios, as a share of the outputs.
        """
        import torch

        from stages.kernels.mismatch import WeightSums, effective_share, weight_sums
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
        """Hold what was measured so far against the limits; without any, ranks exchange nothing.

        Raises:
            MismatchError: a limit is passed; on all ranks alike.
        """
        if any(limit is not None for limit in self.limits.model_dump().values()):
            check_mismatch(self.figures(engine), self.limits)
