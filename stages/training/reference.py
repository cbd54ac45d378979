"""The reference policy pi_ref: frozen, scored beside the policy in training, and resident as long as it is the reference."""

from __future__ import annotations

import torch

from pipeline.residency import resident
from stages.models import Checkpoint
from stages.training.adapters import load_trainable
from stages.training.config import TrainingConfig
from stages.training.engine import Engine

__all__ = ["reference_model"]


def reference_model(reference: Checkpoint, like: Engine, config: TrainingConfig) -> torch.nn.Module:
    """pi_ref, frozen and kept warm for as long as it is the reference; its parameters have the dtype of the engine's.

    An adapted policy is computed as the engine computes its own (W x + s B A x): not as the base under a disabled adapter,
    which is the policy before any training, and not from the merged weights, whose rounding would be a KL above 0.
    """
    dtype = next(like.model.parameters()).dtype

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_trainable(reference, config, dtype)[0]
        return model.to(like.device).requires_grad_(False)

    return resident("reference", (reference.digest, dtype, like.device, config.attention, config.adapter), load)
