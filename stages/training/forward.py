"""Log-probabilities of the output tokens of a micro-batch under a model.

Shapes: B rows, T padded tokens, O longest output, N output tokens of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.kernels.logprobs import entropies, token_logprobs
from stages.training.batching import Batch

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
    model: torch.nn.Module, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
) -> CompletionLogprobs:
    """log pi of every output token of the batch, at the temperature it was sampled at.

    The output head sees only the N positions whose next token is scored: neither prompts nor padding cost logits.
    """
    mask_BO = batch.output_mask_BO
    with _head_only_at(model, batch.target_index_N - 1):
        logits_NV = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).logits.squeeze(0)
    logp_N = token_logprobs(logits_NV, batch.targets_N, temperature=temperature)
    entropy_N = entropies(logits_NV, temperature=temperature) if with_entropy else None
    return CompletionLogprobs(
        logp_BO=_spread(logp_N, mask_BO),
        entropy_BO=None if entropy_N is None else _spread(entropy_N, mask_BO),
        mask_BO=mask_BO,
    )


def _spread(values_N: Tensor, mask_BO: Tensor) -> Tensor:
    return values_N.new_zeros(mask_BO.shape).masked_scatter(mask_BO, values_N)


@contextlib.contextmanager
def _head_only_at(model: torch.nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Inside the block the model's output head is applied to the flattened positions [N] only, as one row.

    A hook on the head instead of calling trunk and head ourselves: whatever the model does after its head (scaling,
    soft-capping) still happens, and an engine that wraps the model (DeepSpeed) still sees a forward of the whole.
    """
    inner: Any = getattr(model, "module", model)

    def select(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH, *others = arguments
        return (hidden_BTH.flatten(0, 1).index_select(0, positions_N).unsqueeze(0), *others)

    handle = inner.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
