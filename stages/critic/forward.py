"""Values before the output tokens of a micro-batch.

Shapes: B rows, T padded tokens, O longest output, N output tokens of the batch, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.training.batching import Batch

__all__ = ["value_head", "values_before"]


def values_before(model: torch.nn.Module, batch: Batch) -> Tensor:
    """V(q, o_<t) for every output token o_t: `[B, O]`, 0 on padding, in the precision of the parameters.

    It is read at the token *before* o_t, where the policy's distribution of o_t is read too: the value knows the question and
    o_<t, and neither o_t nor what follows. (Read at o_t it would be a baseline that depends on the action.)
    """
    positions_N = batch.target_index_N - 1
    with _head_at(model, positions_N):
        value_N: Tensor = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).logits.flatten()
    mask_BO = batch.output_mask_BO
    return value_N.new_zeros(mask_BO.shape).masked_scatter(mask_BO, value_N)


def value_head(model: Any) -> torch.nn.Linear:
    """The last layer of a token classifier, which transformers calls `score` or, in older architectures, `classifier`.

    Raises:
        ValueError: no such layer, or one of more than a single label.
    """
    inner = getattr(model, "module", model)
    head = getattr(inner, "score", None) or getattr(inner, "classifier", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"{type(inner).__name__} is no critic: expected one layer `score` or `classifier` with a single output; "
            "make one from a policy with create_critic"
        )
    return head


@contextlib.contextmanager
def _head_at(model: torch.nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Inside the block the head is applied to the flattened positions [N] only, and never in less than its own precision.

    Under autocast a value of 0.7 would be rounded to steps of 0.004, and a temporal-difference error is a difference of two.
    The layer's `forward` is replaced instead of calling trunk and head ourselves, so that an engine that wraps the model
    (DeepSpeed) still sees a forward of the whole, hooks on the layer included.
    """
    head: Any = value_head(model)

    def forward(hidden_BTH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, positions_N)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return F.linear(hidden_NH.to(head.weight.dtype), head.weight, head.bias)

    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
