"""Read the scores of a classification head of one output at tokens that are named, never guessed.

transformers reads a sequence classifier at the last token that is not padding, by comparing ids; where padding and end of
sequence are one token, that is the token before the end. Here the index is given.

Shapes: B rows, T padded tokens, N scores, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.training.batching import Batch
from stages.training.forward import logits_of


def places_in(batch: Batch, places: Sequence[Sequence[int]]) -> Tensor:
    """Return flattened positions [N] in `[B*T]` of the named output tokens, row after row.

    Args:
        places: for each row of the batch, in its order, indices into its output ids.
    """
    flat = [start + place for start, named in zip(batch.starts, places, strict=True) for place in named]
    return torch.tensor(flat, dtype=torch.long)


def scores_at(model: torch.nn.Module, batch: Batch, positions_N: Tensor) -> Tensor:
    """Return the head's output [N] at flattened positions, in the precision of the parameters; it has read the tokens there.

    A sequence classifier is read at exactly one position of each row, in the order of rows.
    """
    with _head_at(model, positions_N):
        return logits_of(model, batch.inputs).flatten()


def score_head(model: Any) -> torch.nn.Linear:
    """Return the last layer of a classifier, which transformers calls `score` or, in older architectures, `classifier`.

    Raises:
        ValueError: no such layer, or one of more than a single output.
    """
    inner = getattr(model, "module", model)
    head = getattr(inner, "score", None) or getattr(inner, "classifier", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"{type(inner).__name__}: expected one layer `score` or `classifier` with a single output; make a critic with "
            "create_critic, a reward model with create_reward_model"
        )
    return head


@contextlib.contextmanager
def _head_at(model: torch.nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Apply the head, inside the block, to the flattened positions [N] only, and never in less than its own precision.

    Under autocast a value of 0.7 would be rounded to steps of 0.004, and a temporal-difference error is a difference of two.
    The layer's `forward` is replaced instead of calling trunk and head ourselves, so that an engine that wraps the model
    (DeepSpeed) still sees a forward of the whole. A sequence classifier picks one token of each row from what the head
    returns: it gets the row's one score at every token, so that whichever it picks is the right one.
    """
    inner: Any = getattr(model, "module", model)
    head: Any = score_head(model)
    pools = type(inner).__name__.endswith("ForSequenceClassification")

    def forward(hidden_BTH: Tensor) -> Tensor:
        rows, tokens, _ = hidden_BTH.shape
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, positions_N)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            score_N1 = F.linear(hidden_NH.to(head.weight.dtype), head.weight, head.bias)
        return score_N1.view(rows, 1, -1).expand(-1, tokens, -1) if pools else score_N1

    config = inner.config.get_text_config()
    before, padding = head.__dict__.get("forward"), config.pad_token_id
    head.forward = forward
    if pools and padding is None:
        config.pad_token_id = 0  # without one transformers refuses several rows; where it looks does not matter here
    try:
        yield
    finally:
        config.pad_token_id = padding
        if before is None:
            del head.forward
        else:
            head.forward = before
