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
    """`<parameter name>/<slot>`; empty before the first update, and where moments are not kept."""
    skipped_in_a_row: int = 0
    """Of the skipped steps, those since the last update."""


def read_trainer_state(checkpoint: Checkpoint, config: TrainingConfig, adapter: Adapter | None) -> TrainerState:
    """What the checkpoint stores of a trainer: its counters, and moments as `TrainingConfig.optimizer_state` says.

    Args:
        adapter: what is trained in place of the weights.

    Raises:
        ValueError: moments to be carried are of another kind of optimizer, of an adapter where none or another is trained, or
            of the weights where an adapter is.
    """
    stored = load_trainer_state(checkpoint)
    state = TrainerState(
        stored.get("updates", 0), stored.get("skipped", 0), skipped_in_a_row=stored.get("skipped_in_a_row", 0)
    )
    # Without a kind of optimizer there are no moments: none were kept.
    if "optimizer" not in stored or config.optimizer_state == "none":
        return state
    objection = _objection(checkpoint, stored["optimizer"], config, adapter)
    if config.optimizer_state == "reset_once":
        begun = stored.get("optimizer_state") == "reset_once"
        return (
            dataclasses.replace(state, optimizer=load_optimizer_state(checkpoint)) if begun and not objection else state
        )
    if objection:
        raise ValueError(
            f"{checkpoint} holds the optimizer state of {objection}; set training.optimizer_state=reset_once to begin with "
            "fresh moments here and carry these from then on"
        )
    return dataclasses.replace(state, optimizer=load_optimizer_state(checkpoint))


def _objection(checkpoint: Checkpoint, kind: str, config: TrainingConfig, adapter: Adapter | None) -> str | None:
    """Why the moments that a checkpoint holds cannot be those of what is trained."""
    if kind != config.optimizer.kind:
        return f"{kind}, the config asks for {config.optimizer.kind}"
    continued = adapter_base(checkpoint) is None if adapter is None else adapter.continued
    if continued:
        return None
    trained = "all weights" if adapter_base(checkpoint) is None else "an adapter"
    asked = "all weights" if adapter is None else "an adapter" if trained == "all weights" else "another adapter"
    merged = "" if asked == "an adapter" else " (an adapter is then merged into the weights)"
    return f"{trained}, the config asks for training {asked}{merged}"


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
    counters: dict[str, int | str] = {"skipped": state.skipped, "updates": state.updates}
    if state.skipped_in_a_row:
        counters["skipped_in_a_row"] = state.skipped_in_a_row
    if config.optimizer_state != "none":
        write_tensors(folder / OPTIMIZER, state.optimizer)
        counters["optimizer"] = config.optimizer.kind
    if config.optimizer_state == "reset_once":
        counters["optimizer_state"] = "reset_once"
    (folder / TRAINER).write_text(json.dumps(counters, sort_keys=True) + "\n")
