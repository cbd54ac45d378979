"""Activation checkpointing: a layer keeps its input only, and backward computes what is inside it again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False) -> None:
    """Make every layer of `model` recompute its inside in backward.

    transformers' own switch acts in training mode only, which would bring dropout with it: ratios must be exactly 1. Without
    dropout nothing is random, so no state of random numbers is kept.

    Args:
        reentrant: backward of a layer is a graph of its own, made by the recomputation. ZeRO 3 needs it: its hooks gather
            partitioned parameters for the graph they were set in, and recomputation releases them again.

    Raises:
        ValueError: an architecture whose layers transformers does not mark as ones that can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"training.activation_checkpointing: {type(model).__name__} has no layers that transformers can recompute; "
            "set it to false"
        )
    for layer in layers:
        module: Any = layer
        module.forward = functools.partial(_recomputed, layer.forward, reentrant)


def _recomputed(forward: Callable[..., Any], reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    inside = functools.partial(forward, **kwargs)
    return checkpoint(inside, *args, use_reentrant=reentrant, preserve_rng_state=False)
