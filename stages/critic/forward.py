"""Values before the output tokens of a micro-batch.

Shapes: B rows, O longest output, N output tokens of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.training.batching import Batch
from stages.training.scores import scores_at

__all__ = ["values_before"]


def values_before(model: torch.nn.Module, batch: Batch) -> Tensor:
    """V(q, o_<t) for every output token o_t: `[B, O]`, 0 on padding, in the precision of the parameters.

    It is read at the token *before* o_t, where the policy's distribution of o_t is read too: the value knows the question and
    o_<t, and neither o_t nor what follows. (Read at o_t it would be a baseline that depends on the action.)
    """
    value_N = scores_at(model, batch, batch.target_index_N - 1)
    mask_BO = batch.output_mask_BO
    return value_N.new_zeros(mask_BO.shape).masked_scatter(mask_BO, value_N)
