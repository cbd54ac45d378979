"""The seam between training loops and what runs them: one Protocol, plain torch and DeepSpeed behind it.

An engine is a cache of a checkpoint, not state: `holds` names the checkpoint whose weights and optimizer state it has right
now, and everything it knows can be loaded again from there, bit for bit.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from pipeline.residency import resident
from stages.models import Checkpoint
from stages.training.config import DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig

__all__ = ["Engine", "StepReport", "publish", "resident_engine"]


class StepReport(NamedTuple):
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; not finite when the step was skipped."""
    learning_rate: float
    """Rate of the first parameter group (Muon: of the matrices)."""
    skipped: bool
    """True when the gradient was not finite: parameters, moments and schedule are as before."""


class Engine(Protocol):
    """Runs forward, backward and step of one model."""

    model: Any
    """Call it (under `autocast()`) with input_ids, attention_mask and position_ids; has an output head."""
    device: str
    """Where batches belong."""
    holds: str | None
    """Digest of the checkpoint it is equal to; None once anything changed."""
    skipped: int
    """Steps skipped because of a gradient that was not finite, since training began."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes, with and without gradient."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`, which is already divided by the global denominator.

        Args:
            last: this is the final micro-batch before `step`.
        """
        ...

    def step(self, *, factor: float = 1.0) -> StepReport:
        """Clip, schedule, update, and forget the gradient; `factor` multiplies the scheduled learning rate."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Become the checkpoint: weights, optimizer state and counters; accumulated gradients are dropped."""
        ...

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write a complete checkpoint: description, float32 masters and (unless left out) the optimizer's state."""
        ...


def resident_engine(checkpoint: Checkpoint, config: TrainingConfig, slot: str = "trainer") -> Engine:
    """The engine kept warm in `slot`, holding exactly `checkpoint`; it loads only when it holds something else."""
    architecture = (checkpoint.path / "config.json").read_text()
    key = (json.dumps(config.key(), sort_keys=True), architecture)
    engine = resident(slot, key, lambda: _make_engine(checkpoint, config))
    if engine.holds != checkpoint.digest or not config.carry_optimizer:
        engine.load(checkpoint)
    return engine


def publish(engine: Engine, *, optimizer: bool = True) -> Checkpoint:
    """Publish what the engine has as a checkpoint, which it then holds."""
    checkpoint = Checkpoint.write(lambda folder: engine.save(folder, optimizer=optimizer))
    # Without its optimizer state the checkpoint is less than the engine: the next stage call must start from the artifact.
    engine.holds = checkpoint.digest if optimizer else None
    return checkpoint


def _make_engine(checkpoint: Checkpoint, config: TrainingConfig) -> Engine:
    match config.engine:
        case TorchEngineConfig():
            from stages.training.torch_engine import TorchEngine

            return TorchEngine(checkpoint, config)
        case DeepSpeedEngineConfig():
            from stages.training.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(checkpoint, config)
        case _ as unknown:
            assert_never(unknown)


def autocast(device: str, config: TrainingConfig) -> AbstractContextManager[Any]:
    """bfloat16 matrix products with float32 parameters, or float32 throughout."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16")
