"""Log-probabilities of the outputs under fixed policies: of policy and reference for a KL in the reward (DeepSeekMath, Eq. 2),
or of the reference only, ahead of an update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Final

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import with_scores
from stages.models import Checkpoint
from stages.tables import Logprobs, ReferenceLogprobs, Rollouts
from stages.training.batching import rows_of
from stages.training.config import TrainingConfig
from stages.training.ranks import on_ranks

_UNSOUND: Final = (
    "a log-probability under the {name} is not finite; does the {name} have NaN weights, or was a token sampled that it "
    "cannot say?"
)


class LogprobsConfig(Config):
    """Say how outputs are scored under policy and reference, or the reference only."""

    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward; bounds memory and changes no result but in its last bits."""
    training: TrainingConfig = TrainingConfig()
    """The policy update's own: with equal settings the policy is scored by the engine that trains it, loaded once."""


@stage(version="1")
@on_ranks
def compare_policies(policy: Checkpoint, reference: Checkpoint, outputs: Rollouts, config: LogprobsConfig) -> Logprobs:
    """Compute log pi(o_t | q, o_<t) of every output token under pi_theta and pi_ref, in the order of `outputs`.

    Their difference is the penalty in PPO's reward, -beta log(pi_theta / pi_ref) (DeepSeekMath, Eq. 2). Both are computed in
    the same micro-batches and the same precision, so that equal policies differ by exactly 0.

    Args:
        policy: pi_theta, the policy that sampled `outputs`.
        reference: pi_ref.
        outputs: o_i with their ids; the temperature they were sampled at scales the logits of both policies.
        config: batching, engine.

    Raises:
        ValueError: outputs of several temperatures or greedy ones, or a log-probability that is not finite, by its row.
    """
    from torch import Tensor

    from stages.training.batching import Batch
    from stages.training.forward import completion_logprobs, sampling_temperature
    from stages.training.loop import reference_for_pass, resident_engine, score_rows

    started = time.perf_counter()
    temperature = sampling_temperature(outputs)
    keys, rows = rows_of(outputs)
    with config.training.arithmetic():
        engine = resident_engine(policy, config.training)

        def under(model: Any) -> list[list[float]]:
            def score(batch: Batch) -> Tensor:
                with engine.autocast():
                    given = batch.to(engine.device)
                    return completion_logprobs(model, given, temperature, max_logits=engine.max_logits).logp_BO

            return score_rows(rows, config.micro_batch_tokens, model, score, engine)

        current = under(engine.model)
        with reference_for_pass(reference, config.training, engine.device, place=engine.device) as model:
            frozen = under(model)
    compared = with_scores(keys, _UNSOUND, policy=current, reference=frozen)
    record_metrics({"policy/kl_k1": _mean_k1(current, frozen), "time/logprobs": time.perf_counter() - started})
    return Logprobs.write(compared)


@stage(version="1")
@on_ranks
def score_reference(reference: Checkpoint, outputs: Rollouts, config: LogprobsConfig) -> ReferenceLogprobs:
    """Compute log pi_ref(o_t | q, o_<t) of every output token, in the order of `outputs`, for `update_policy` to compare with.

    The model is loaded once for all passes of an iteration. Between them it is in host memory, pinned where it is moved to a
    GPU for a pass. None is loaded where the trainer in memory has an adapter on the same base: its model takes the
    reference's factors for the pass, with equal bits. Where the update computes all outputs in one mini-batch, with equal
    `micro_batch_tokens`, its micro-batches are these, and the values are bit for bit those it would compute itself. Where it
    leaves outputs out (masked by a null advantage, unpaired) or deals them to several mini-batches, micro-batches are made of
    other rows. That may change the last bits (of 1e-7 in float32; k3 is quadratic in them). At the first step of an iteration
    the reference is the policy: `update_policy` then takes the policy's own values, and KL is exactly 0.

    Args:
        reference: pi_ref.
        outputs: o_i with their ids; the temperature they were sampled at scales the logits.
        config: batching, precision, adapter.

    Raises:
        ValueError: outputs of several temperatures or greedy ones, or a log-probability that is not finite, by its row.
    """
    from torch import Tensor

    from stages.training.batching import Batch
    from stages.training.engine import autocast
    from stages.training.forward import completion_logprobs, sampling_temperature
    from stages.training.hardware import peak_memory, training_device
    from stages.training.loop import reference_for_pass, score_rows

    started, device, training = time.perf_counter(), training_device(), config.training
    temperature = sampling_temperature(outputs)
    keys, rows = rows_of(outputs)
    with training.arithmetic(), peak_memory() as peak:

        def score(batch: Batch) -> Tensor:
            with autocast(device, training):
                return completion_logprobs(model, batch.to(device), temperature, max_logits=training.max_logits).logp_BO

        with reference_for_pass(reference, training, device) as model:
            found = score_rows(rows, config.micro_batch_tokens, model, score)
    scored = with_scores(keys, _UNSOUND, reference=found)
    record_metrics({"time/reference": time.perf_counter() - started, "memory/reference_mb": peak.mib})
    return ReferenceLogprobs.write(scored)


def _mean_k1(policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float:
    """k1 = log pi_theta - log pi_ref, in nats: mean over outputs of the mean over tokens."""
    return fmean(
        fmean(logp - ref_logp for logp, ref_logp in zip(*pair, strict=True))
        for pair in zip(policy, reference, strict=True)
    )
