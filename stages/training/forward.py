"""Log-probabilities of the output tokens of a micro-batch under a model.

Shapes: B rows, T padded tokens, O longest output, N output tokens of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.kernels.head import HeadScores
from stages.kernels.logprobs import entropies, token_logprobs
from stages.training.batching import Batch, spread
from stages.training.head import chunked_scores, head_only_at, logit_transform, partitioned

__all__ = ["CompletionLogprobs", "completion_logprobs"]


class CompletionLogprobs(NamedTuple):
    """Per output token; column o of row b is output token o of row `batch.rows[b]`."""

    logp_BO: Tensor
    """log pi(o_t | q, o_<t) in nats, 0 on padding; float32, or float64 where the logits are."""
    entropy_BO: Tensor | None
    """Entropy of the distribution that o_t was drawn from, in nats, without gradient; None unless asked for."""
    mask_BO: Tensor
    """True on output tokens."""


def completion_logprobs(
    model: torch.nn.Module,
    batch: Batch,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    max_logits: int | None = None,
) -> CompletionLogprobs:
    """log pi of every output token of the batch, at the temperature it was sampled at.

    The output head sees only the N positions whose next token is scored: neither prompts nor padding cost logits.

    Args:
        max_logits: above so many logits (N V) they are computed in chunks, forward and backward; None: never.
    """
    mask_BO = batch.output_mask_BO
    scores = _in_chunks(model, batch, temperature, with_entropy, max_logits)
    if scores is None:
        scores = _in_full(model, batch, temperature, with_entropy)
    return CompletionLogprobs(
        logp_BO=spread(scores.logp_N, mask_BO),
        entropy_BO=None if scores.entropy_N is None else spread(scores.entropy_N, mask_BO),
        mask_BO=mask_BO,
    )


def _in_full(model: torch.nn.Module, batch: Batch, temperature: float, with_entropy: bool) -> HeadScores:
    with head_only_at(model, batch.target_index_N - 1):
        logits_NV = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).logits.squeeze(0)
    logp_N = token_logprobs(logits_NV, batch.targets_N, temperature=temperature)
    return HeadScores(logp_N, entropies(logits_NV, temperature=temperature) if with_entropy else None)


def _in_chunks(
    model: torch.nn.Module, batch: Batch, temperature: float, with_entropy: bool, max_logits: int | None
) -> HeadScores | None:
    """None where the logits are few enough, or the model's head cannot be taken apart."""
    if max_logits is None:
        return None
    inner: Any = getattr(model, "module", model)
    few = len(batch.targets_N) * inner.config.get_text_config().vocab_size <= max_logits
    # Ranks that share parameters must pass through the same modules, also where one's micro-batch is small.
    if few and not partitioned(model):
        return None
    transform = logit_transform(model)
    if transform is None:
        return None
    return chunked_scores(
        model, batch, transform, temperature=temperature, max_logits=max_logits, with_entropy=with_entropy
    )
