"""Optimizer state and counters of a checkpoint: written by parameter name, restored bit for bit by any engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.models import (
    OPTIMIZER,
    TRAINER,
    WEIGHTS,
    Checkpoint,
    load_optimizer_state,
    load_trainer_state,
    write_tensors,
)
from stages.training.adapters import Adapter, adapter_base, merge, write_adapter_state
from stages.training.config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TrainerState", "read_trainer_state", "write_checkpoint"]


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Where training stands."""

    updates: int = 0
    """Optimizer updates applied; the schedule counts these."""
    skipped: int = 0
    """Steps skipped because of a gradient that was not finite."""
    optimizer: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """`<parameter name>/<slot>`; empty before the first update."""


def read_trainer_state(checkpoint: Checkpoint, config: TrainingConfig, adapter: Adapter | None) -> TrainerState:
    """What the checkpoint stores of a trainer; a fresh one where it stores nothing or nothing is to be carried over.

    Args:
        adapter: what is trained in place of the weights.

    Raises:
        ValueError: the state belongs to another kind of optimizer, or to an adapter where none or another is trained, or to the
            weights where an adapter is.
    """
    stored = load_trainer_state(checkpoint)
    if not stored or not config.carry_optimizer:
        return TrainerState()
    if stored["optimizer"] != config.optimizer.kind:
        raise ValueError(
            f"{checkpoint} holds the state of optimizer {stored['optimizer']}, the config asks for "
            f"{config.optimizer.kind}; set carry_optimizer=false to begin with a fresh one"
        )
    continued = adapter_base(checkpoint) is None if adapter is None else adapter.continued
    if not continued:
        trained = "all weights" if adapter_base(checkpoint) is None else "an adapter"
        asked = "all weights" if adapter is None else "an adapter" if trained == "all weights" else "another adapter"
        raise ValueError(
            f"{checkpoint} holds the optimizer state of {trained}, the config asks for training {asked}; set "
            "training.carry_optimizer=false to begin with a fresh one (an adapter is then merged into the weights)"
        )
    return TrainerState(stored["updates"], stored["skipped"], load_optimizer_state(checkpoint))


def write_checkpoint(
    folder: Path,
    *,
    description: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
    state: TrainerState | None,
    config: TrainingConfig,
    adapter: Adapter | None,
    previous: Checkpoint | None,
) -> None:
    """Write weights, adapter, and `state` unless it is None, beside the files that describe the model.

    Args:
        description: the files that describe the model, by name (`read_description`); kept in memory, since the checkpoint
            that they came with may be pruned by now.
        previous: the checkpoint that training went on from.
    """
    for name, content in description.items():
        (folder / name).write_bytes(content)
    write_tensors(folder / WEIGHTS, weights if adapter is None else merge(weights, adapter))
    if adapter is not None:
        write_adapter_state(folder, weights, adapter, previous)
    if state is None:
        return
    write_tensors(folder / OPTIMIZER, state.optimizer)
    counters = {"optimizer": config.optimizer.kind, "skipped": state.skipped, "updates": state.updates}
    (folder / TRAINER).write_text(json.dumps(counters, sort_keys=True) + "\n")
