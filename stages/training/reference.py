"""The reference policy pi_ref: frozen, scored beside the policy in training, and resident as long as it is the reference."""

from __future__ import annotations

import torch

from pipeline.residency import resident
from stages.models import Checkpoint, load_model
from stages.training.config import TrainingConfig
from stages.training.engine import Engine

__all__ = ["reference_model"]


def reference_model(reference: Checkpoint, like: Engine, config: TrainingConfig) -> torch.nn.Module:
    """pi_ref, frozen and kept warm for as long as it is the reference; its parameters have the dtype of the engine's."""
    dtype = next(like.model.parameters()).dtype

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_model(reference, dtype=dtype, attention=config.attention)
        return model.to(like.device).requires_grad_(False)

    return resident("reference", (reference.digest, dtype, like.device, config.attention), load)
