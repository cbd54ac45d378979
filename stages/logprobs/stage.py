"""Scoring outputs under two policies as a stage: outputs in, log-probabilities out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pipeline.stage import record_metrics, stage
from stages.logprobs.config import LogprobsConfig
from stages.logprobs.rows import refuse_nonfinite, rows_of
from stages.models import Checkpoint
from stages.tables import Logprobs, Rollouts
from stages.training.ranks import on_ranks

__all__ = ["compare_policies"]


@stage(version="1")
@on_ranks
def compare_policies(policy: Checkpoint, reference: Checkpoint, outputs: Rollouts, config: LogprobsConfig) -> Logprobs:
    """log pi(o_t | q, o_<t) of every output token under pi_theta and pi_ref, in the order of `outputs`.

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

    from stages.training import threads
    from stages.training.batching import Batch
    from stages.training.forward import completion_logprobs, sampling_temperature
    from stages.training.loop import reference_model, resident_engine, score_rows

    started = time.perf_counter()
    temperature = sampling_temperature(outputs)
    keys, rows = rows_of(outputs)
    with threads(config.training.threads):
        engine = resident_engine(policy, config.training)

        def under(model: Any) -> list[list[float]]:
            def score(batch: Batch) -> Tensor:
                with engine.autocast():
                    given = batch.to(engine.device)
                    return completion_logprobs(model, given, temperature, max_logits=engine.max_logits).logp_BO

            return score_rows(rows, config.micro_batch_tokens, score, engine)

        current, frozen = under(engine.model), under(reference_model(reference, engine, config.training))
    compared = [
        key | {"policy": logp, "reference": ref_logp} for key, logp, ref_logp in zip(keys, current, frozen, strict=True)
    ]
    refuse_nonfinite(compared, "policy", "reference")
    record_metrics({"policy/kl_k1": _mean_k1(compared), "time/logprobs": time.perf_counter() - started})
    return Logprobs.write(compared)


def _mean_k1(compared: Sequence[dict[str, Any]]) -> float:
    """k1 = log pi_theta - log pi_ref, in nats: mean over outputs of the mean over tokens."""
    return fmean(
        fmean(logp - ref_logp for logp, ref_logp in zip(row["policy"], row["reference"], strict=True))
        for row in compared
    )
