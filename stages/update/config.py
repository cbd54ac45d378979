"""Configuration of the policy update."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from pipeline.config import UNKEYED, Config
from stages.training.config import TrainingConfig
from stages.update.objectives import GRPOConfig, Level, ObjectiveConfig


class NoCorrectionConfig(Config):
    """The rollout engine's own log-probabilities are not used: pi_old is what the trainer computes (the paper's setting)."""

    kind: Literal["none"] = "none"
    "Selects no correction."


class TruncatedCorrectionConfig(Config):
    """The surrogate is multiplied by w = min(pi_old / pi_rollout, cap): `stages/kernels/logprobs.py`.

    Metrics, means with the loss's own weights: `policy/correction_mean` (w), `policy/correction_raw_mean` (w before the cap, up
    to e^20) and `policy/correction_clipped` (the share of w above the cap: of outputs, where each has one w and one weight).
    """

    kind: Literal["truncated"] = "truncated"
    "Selects truncated importance weights."
    level: Level = "token"
    """One weight a token, or one an output: the product of its tokens' weights (`sequence`), which grows with the length, or
    their geometric mean (`sequence_mean`)."""
    cap: PositiveFloat = 2.0
    "Largest weight (Yao et al. 2025 use 2)."


class MismatchLimits(Config):
    """How far the trainer may be from what the rollout engine recorded before a run stops; null: any distance.

    For outputs that are the policy's own, before the optimizer step that would learn from them. What the figures cover:
    `stages/update/metrics.py`; of several mini-batches, each step is checked with those computed so far. Ours.
    """

    max_mean: PositiveFloat | None = None
    "Most nats per token that the two may differ by in the mean (`rollout/mismatch_mean`)."
    max_kl: Literal["auto"] | PositiveFloat | None = "auto"
    """Largest divergence of the two, in nats per token (`rollout/mismatch_kl`). `auto`: what stops a run on vLLM whose engine
    has stale weights, without mistaking rounding for them. None for `hf`, which copies the trainer's weights in its own
    process, and where one update is computed outside of a run (`cohort replay`).

    `auto` is 10 times the divergence at the run's first update, at least 0.002 and at most 0.05; where engine and trainer are
    both set to float32, 1,000 times, at least 1e-9 and at most 1e-3 (`stages/update/metrics.py: staleness_limit`).

    Measured with vLLM's CPU build, 0.36 M parameters trained on arithmetic. In bfloat16 fresh weights have at most 8e-5 (a flat
    policy's grew 16-fold, to 9e-6); 1, 2 and 5 updates of 3e-4 behind it is 8e-4, 4e-3 and 1e-2. Ten updates of 1e-6 behind it
    is 1e-5: no limit tells that from rounding. In float32 fresh weights have 1e-13, one update of 1e-6 behind it is 6e-8."""
    min_ess: float | None = Field(None, gt=0, le=1)
    """Least effective sample size of the outputs' importance ratios, as a share of the outputs (`rollout/mismatch_ess`). It
    falls with the length of outputs: what the tokens differ by adds up."""

    @property
    def given(self) -> dict[str, float]:
        """Return the limits that are numbers; `auto` is one only once the run has resolved it."""
        return {name: limit for name, limit in self.model_dump().items() if isinstance(limit, float)}


class UpdateConfig(Config):
    """One exploration stage's updates."""

    objective: ObjectiveConfig = GRPOConfig()
    "What is maximised: a row of the paper's Table 10, or a later method."
    mu: int = Field(1, ge=1)
    "Passes over the outputs (Algorithm 1, line 10). The paper: a single update per exploration stage (4.2)."
    mini_batches: int = Field(1, ge=1)
    "Optimizer steps per pass; questions are dealt to them at random, groups stay whole. 1 = the paper."
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Where log pi_old comes from. `trainer`: the policy as it is before its updates, which makes the first ratio exactly 1;
    the outputs must be its own. `rollout`: what the engine recorded while sampling, for outputs of an earlier policy."""
    correction: Annotated[NoCorrectionConfig | TruncatedCorrectionConfig, Field(discriminator="kind")] = (
        NoCorrectionConfig()
    )
    "Importance weights between rollout engine and trainer; not in the paper."
    mismatch: Annotated[MismatchLimits, UNKEYED] = MismatchLimits()
    "When the run stops because engine and trainer disagree."
    temperature: PositiveFloat | None = None
    """Temperature the outputs must have been sampled at; others are refused. null: whatever they were sampled at. In either
    case it divides the logits of all policies, so that ratios compare what was really sampled from."""
    micro_batch_tokens: int = Field(16384, ge=1)
    "Padded tokens per forward and backward; bounds memory. Gradients are accumulated with the batch's own denominator."
    merge_equal_outputs: bool = True
    "Compute equal outputs of a question once, weighted by their count: the same sum, up to rounding, for less work."
    training: TrainingConfig = TrainingConfig()
    "Engine, optimizer, precision, learning rate."

    @model_validator(mode="after")
    def _one_use_of_rollout_logprobs(self) -> Self:
        if self.old_logprobs == "rollout" and self.correction.kind != "none":
            raise ValueError(
                "correction compares pi_old with the rollout's records, which old_logprobs=rollout makes equal"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_objective(self) -> Self:
        """Refuse what the objective is not defined for, and what would reach neither its gradient nor a check."""
        kind, row = self.objective.kind, self.objective.ROW
        if self.mu * self.mini_batches > 1 and not row.several_steps:
            raise ValueError(
                f"mu and mini_batches: {kind} has no ratio pi_theta / pi_old, and from the second optimizer step on the "
                f"outputs are an earlier policy's; expected 1 and 1, found {self.mu} and {self.mini_batches}"
            )
        if self.old_logprobs == "rollout" and not row.uses_ratio:
            raise ValueError(f"old_logprobs: pi_old does not enter {kind}; set old_logprobs=trainer")
        if isinstance(self.correction, TruncatedCorrectionConfig) and self.correction.level not in row.corrections:
            expected = " or ".join(("none", *row.corrections))
            raise ValueError(
                f"correction: expected {expected} for {kind}, found level {self.correction.level}; {row.because}"
            )
        limits = list(self.mismatch.given)
        if limits and not self.measures_mismatch:
            raise ValueError(
                f"mismatch.{limits[0]}: nothing is measured where the outputs need not be the policy's own (objective {kind}, "
                f"old_logprobs {self.old_logprobs}); set it to null"
            )
        return self

    @property
    def reads_rollout_logprobs(self) -> bool:
        """Whether the engine's log-probabilities enter the loss."""
        return self.old_logprobs == "rollout" or self.correction.kind != "none"

    @property
    def measures_mismatch(self) -> bool:
        """Whether the outputs are sure to be the policy's own, so that engine and trainer speak of one policy.

        Those of an earlier policy or of a demonstrator have log-probabilities that say nothing about the engine.
        """
        row = self.objective.ROW
        return self.old_logprobs == "trainer" and (row.uses_ratio or row.sources == ("policy",))

    @property
    def needs_reference(self) -> bool:
        """Whether log pi_ref enters the loss."""
        return getattr(self.objective, "beta", 0.0) > 0
