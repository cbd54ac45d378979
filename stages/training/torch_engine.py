"""Plain torch on one device: float32 parameters, bfloat16 autocast where the precision says so."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.orchestration.interruption import check
from stages.models import Checkpoint, model_weights, read_description
from stages.training.adapters import load_trainable, reload_trainable
from stages.training.config import TrainingConfig
from stages.training.engine import (
    StepReport,
    autocast,
    check_skipped,
    checkpoint_activations,
    clip_gradients,
    name_of_broken_gradient,
)
from stages.training.hardware import training_device
from stages.training.optimizers import (
    TrainerState,
    build_optimizer,
    learning_rate_factor,
    optimizer_state,
    read_trainer_state,
    restore_optimizer_state,
    set_learning_rate,
    write_checkpoint,
)

__all__ = ["TorchEngine"]


class TorchEngine:
    """See `stages.training.engine.Engine`.

    Raises:
        ValueError: this process is one of several ranks.
    """

    rank = 0
    world_size = 1

    def __init__(self, checkpoint: Checkpoint, config: TrainingConfig) -> None:
        _refuse_ranks()
        self._config = config
        self.device = training_device()
        self.holds: str | None = None
        self.max_logits = config.max_logits
        self.model: Any
        self.model, self._adapter = load_trainable(checkpoint, config, torch.float32)
        self.model.to(self.device)
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        self._optimizer = build_optimizer(self.model, config.optimizer)
        self._restore(checkpoint)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes."""
        return autocast(self.device, self._config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a loss."""
        check()
        self._change()
        self._losses.append(loss.detach())
        torch.autograd.backward(loss)

    def step(self, *, factor: float = 1.0) -> StepReport:
        """Clip, schedule, update."""
        self._change()
        rate = set_learning_rate(self._optimizer, factor * learning_rate_factor(self._updates, self._config))
        norm = clip_gradients(self.model, self._config.max_grad_norm)
        finite = math.isfinite(norm)
        if finite:
            self._optimizer.step()
            self._updates += 1
            self._in_a_row = 0
        else:
            self.skipped += 1
            self._in_a_row += 1
            gradient = name_of_broken_gradient(self.model)
            check_skipped(self, self._in_a_row, self._config.max_skipped_steps, self._losses, gradient)
        self._losses.clear()
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm=norm, learning_rate=rate, skipped=not finite)

    def load(self, checkpoint: Checkpoint) -> None:
        """Overwrite weights, optimizer state and counters in place."""
        self.holds = None
        self._adapter = reload_trainable(self.model, self._adapter, checkpoint, self._config)
        self._restore(checkpoint)

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write a complete checkpoint."""
        moments = optimizer_state(self.model, self._optimizer)
        state = TrainerState(self._updates, self.skipped, moments, self._in_a_row)
        write_checkpoint(
            folder,
            description=self._description,
            weights=model_weights(self.model),
            state=state if optimizer else None,
            config=self._config,
            adapter=self._adapter,
            previous=self._previous,
        )

    def total(self, value: float) -> float:
        """The value itself: there is one rank."""
        return value

    def _change(self) -> None:
        """Note that the engine is about to differ from the checkpoint that it holds, and which that was."""
        if self.holds is not None:
            self._previous, self.holds = Checkpoint(self.holds), None

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._description = read_description(checkpoint.path)
        self._optimizer.zero_grad(set_to_none=True)
        state = read_trainer_state(checkpoint, self._config, self._adapter)
        restore_optimizer_state(self.model, self._optimizer, state.optimizer)
        self._updates, self.skipped, self._in_a_row = state.updates, state.skipped, state.skipped_in_a_row
        self._losses: list[Tensor] = []
        self._previous, self.holds = checkpoint, checkpoint.digest


def _refuse_ranks() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"training.engine torch: expected one process, found rank {distributed.get_rank()} of "
            f"{distributed.get_world_size()}; plain torch trains on one device, set training.engine.kind to deepspeed"
        )
