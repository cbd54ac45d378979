"""Plain torch on one device: float32 parameters, bfloat16 autocast where the precision says so."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline.orchestration.interruption import check
from stages.models import Checkpoint
from stages.training.adapters import factors_on_base, load_trainable, reload_trainable, with_factors
from stages.training.config import TrainingConfig
from stages.training.engine import (
    CheckpointedEngine,
    StepReport,
    checkpoint_activations,
)
from stages.training.optimizers import (
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    name_of_broken_gradient,
    optimizer_state,
    read_trainer_state,
    restore_optimizer_state,
    set_learning_rate,
)


class TorchEngine(CheckpointedEngine):
    """Implement `stages.training.engine.Engine`.

    Raises:
        ValueError: this process is one of several ranks.
    """

    def __init__(self, checkpoint: Checkpoint, config: TrainingConfig) -> None:
        _refuse_ranks()
        super().__init__(config)
        self.model, self._adapter = load_trainable(checkpoint, config, torch.float32)
        self.model.to(self.device)
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        self._optimizer = build_optimizer(self.model, config.optimizer)
        self._restore(checkpoint)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a loss."""
        check()
        self.holds = None
        self._losses.append(loss.detach())
        torch.autograd.backward(loss)

    def step(self, *, factor: float = 1.0) -> StepReport:
        """Clip, schedule, update."""
        self.holds = None
        rate = set_learning_rate(self._optimizer, factor * learning_rate_factor(self._updates, self._config))
        norm = clip_gradients(self.model, self._config.max_grad_norm)
        skipped = not math.isfinite(norm)
        if not skipped:
            self._optimizer.step()
        gradient = name_of_broken_gradient(self.model) if skipped else ""
        report = self._stepped(norm, rate, skipped=skipped, gradient=gradient)
        self._optimizer.zero_grad(set_to_none=True)
        return report

    def load(self, checkpoint: Checkpoint) -> None:
        """Overwrite weights, optimizer state and counters in place."""
        self.holds = None
        self._adapter = reload_trainable(self.model, self._adapter, checkpoint, self._config)
        self._restore(checkpoint)

    def as_reference(self, reference: Checkpoint) -> AbstractContextManager[None] | None:
        """Return a context in which the model is `reference`, without gradient; None where it is not on this adapter's base."""
        factors = None if self._adapter is None else factors_on_base(reference, self._adapter)
        return None if factors is None else with_factors(self.model, factors)

    def _moments(self) -> dict[str, Tensor]:
        return optimizer_state(self.model, self._optimizer)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        state = read_trainer_state(checkpoint, self._config, self._adapter)
        restore_optimizer_state(self.model, self._optimizer, state.optimizer)
        self._take_over(checkpoint, state)


def _refuse_ranks() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"training.engine torch: expected one process, found rank {distributed.get_rank()} of "
            f"{distributed.get_world_size()}; plain torch trains on one device, set training.engine.kind to deepspeed"
        )
