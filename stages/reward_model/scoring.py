"""Scores of one reward model for many inputs, in the order given.

Legend: N scores of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.orchestration.interruption import check
from pipeline.residency import resident
from stages.models import Checkpoint, load_model, reward_kind
from stages.reward_model.config import ScoringConfig
from stages.training.batching import Row, micro_batches
from stages.training.hardware import training_device
from stages.training.scores import places_in, scores_at

__all__ = ["Input", "scores_of"]


class Input(NamedTuple):
    """An output and where its scores are read; equal ones are scored once."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    places: tuple[int, ...]
    """Indices into `output_ids`."""


def scores_of(checkpoint: Checkpoint, inputs: Sequence[Input], config: ScoringConfig) -> list[list[float]]:
    """The model's logits at the places of each input; batches of like length, the model kept warm."""
    device = training_device()
    model = _resident(checkpoint, config, device)
    distinct = list(dict.fromkeys(inputs))
    found: dict[Input, list[float]] = {}
    rows = [Row(each.prompt_ids, each.output_ids) for each in distinct]
    for batch in micro_batches(rows, config.micro_batch_tokens):
        check()
        held = [distinct[row] for row in batch.rows]
        positions_N = places_in(batch, [each.places for each in held]).to(device)
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            scores = iter(scores_at(model, batch.to(device), positions_N).tolist())
        found |= {each: [next(scores) for _ in each.places] for each in held}
    return [found[each] for each in inputs]


def _resident(checkpoint: Checkpoint, config: ScoringConfig, device: str) -> torch.nn.Module:
    """The model, frozen; one of each kind stays in memory."""

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_model(checkpoint, dtype=torch.float32, attention=config.attention)
        return model.to(device).requires_grad_(False)

    slot = {"outcome": "reward_model", "process": "process_reward_model"}[reward_kind(checkpoint)]
    return resident(slot, (checkpoint.digest, device, config.attention), load)
