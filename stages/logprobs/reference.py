"""The reference policy on the outputs of one exploration stage, in a pass of its own: no second model during the update."""

from __future__ import annotations

import time

from pipeline.stage import record_metrics, stage
from stages.logprobs.config import LogprobsConfig
from stages.logprobs.rows import refuse_nonfinite, rows_of
from stages.models import Checkpoint
from stages.tables import ReferenceLogprobs, Rollouts
from stages.training.ranks import on_ranks

__all__ = ["score_reference"]


@stage(version="1")
@on_ranks
def score_reference(reference: Checkpoint, outputs: Rollouts, config: LogprobsConfig) -> ReferenceLogprobs:
    """log pi_ref(o_t | q, o_<t) of every output token, in the order of `outputs`, for `update_policy` to compare with.

    The model is loaded for the pass and freed after it. Where the update computes all outputs in one mini-batch, with equal
    `micro_batch_tokens`, its micro-batches are these, and the values are bit for bit those it would compute itself. Where it
    leaves outputs out (masked by a null advantage, unpaired) or deals them to several mini-batches, rows stand beside other
    rows, which may change their last bits (of 1e-7 in float32; k3 is quadratic in them). At the first step of an iteration the
    reference is the policy: `update_policy` then takes the policy's own values, and KL is exactly 0.

    Args:
        reference: pi_ref.
        outputs: o_i with their ids; the temperature they were sampled at scales the logits.
        config: batching, precision, adapter.

    Raises:
        ValueError: outputs of several temperatures or greedy ones, or a log-probability that is not finite, by its row.
    """
    import torch
    from torch import Tensor

    from stages.training import threads
    from stages.training.adapters import load_trainable
    from stages.training.batching import Batch
    from stages.training.engine import autocast
    from stages.training.forward import completion_logprobs, sampling_temperature
    from stages.training.hardware import peak_memory, training_device
    from stages.training.loop import score_rows

    started, device, training = time.perf_counter(), training_device(), config.training
    temperature = sampling_temperature(outputs)
    keys, rows = rows_of(outputs)
    with threads(training.threads), peak_memory() as peak:
        model = load_trainable(reference, training, torch.float32)[0].to(device).requires_grad_(False)

        def score(batch: Batch) -> Tensor:
            with autocast(device, training):
                return completion_logprobs(model, batch.to(device), temperature, max_logits=training.max_logits).logp_BO

        found = score_rows(rows, config.micro_batch_tokens, score)
    scored = [key | {"reference": logp} for key, logp in zip(keys, found, strict=True)]
    refuse_nonfinite(scored, "reference")
    record_metrics({"time/reference": time.perf_counter() - started, "memory/reference_mb": peak.mib})
    return ReferenceLogprobs.write(scored)
